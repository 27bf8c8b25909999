"""Zero-shot retrieval with a checkpoint: `python eval.py checkpoint=DIR data=NAME [key=value …]`, or `pe-av eval`. The
settings are explained in pe_av/config/run.py. checkpoint=[A,B] compares checkpoints, and data=[x,y] goes through data
sets."""

from pe_av.commands import evaluate

if __name__ == "__main__":
    evaluate()
