"""What a run will need and take, before a GPU is paid for: fake tensors through the real model.

Imports of this room point one way: hardware, fake_ranks, measure <- memory, schedule, speed <- plan
<- report <- search <- run, and measure <- roofline. Must not know: data, checkpoints.
"""
