"""Several processes: optimizer steps in one go and interrupted end alike."""

import torch
import torch.distributed as dist

from tests.training.test_step import batches, network, recipe
from training.protocol import Plan
from training.step import Step

dist.init_process_group("gloo")
torch.set_num_threads(1)
plan = Plan(batch=4, sgd_batch=8 * dist.get_world_size(), devices=dist.get_world_size(),
            micro_batch=4, lr=0.1)  # fmt: skip
seen = [(x + dist.get_rank(), y) for x, y in batches(6)]
ends = []
for parts in ([seen], [seen[:1], seen[1:3], seen[3:]]):
    state = None
    for part in parts:
        step = Step(network("gn"), plan, recipe())
        if state:
            step.load_state_dict(state)
        for images, labels in part:
            step(images, labels, 0.1)
        state = step.state_dict() | {"others": dist.get_world_size() * [step.rng()]}
        state["others"].pop()
    ends.append(state["model"])
same = [torch.equal(value, ends[1][key]) for key, value in ends[0].items()]
everyone = torch.tensor(int(all(same)))
dist.all_reduce(everyone, dist.ReduceOp.MIN)
assert everyone, sum(same)
dist.destroy_process_group()
