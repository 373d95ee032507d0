"""The files of adapters: keys, configs and weights, of PEFT, of other tools and of torch.save."""
