"""Training by Algorithm 1 of Dahari et al. 2022, on one process or many.

Only the module `distributed` uses torch.distributed.
"""
