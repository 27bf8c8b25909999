"""Checkpoints of other formats, in and out. In reading order:

weight_names.py      the key maps between our weights and the published formats, as tables
read_config.py       a published config.json -> our config
write_config.py      our config -> the files beside the weights that transformers needs
read_checkpoint.py   a folder or hub name of any known format -> config and weights under our names
write_checkpoint.py  `python convert.py`: writes what was read as our format or as transformers'
warm_start.py        single towers of a new model from ModernBERT, PE-Core or DAC weights (`init.*` of a training)
"""
