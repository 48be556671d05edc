"""Algorithm 1 of Dahari et al. 2022 on one process or many. torch.distributed only in `distributed`."""
