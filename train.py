"""Train PE-AV: `python train.py [key=value …]`, or `pe-av train`. The settings are explained in pe_av/config/run.py."""

from pe_av.commands import train

if __name__ == "__main__":
    train()
