"""Convert a checkpoint: `python convert.py source=DIR target=DIR [to=native|hf]`, or `pe-av convert`.

The source's format is recognized by its contents. `source` may also be a name on the Hugging Face hub, such as
facebook/pe-av-large.
"""

from pe_av.commands import convert

if __name__ == "__main__":
    convert()
