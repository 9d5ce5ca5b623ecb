"""Plan a placement from the file's header, keep the first layers on the CPU, save it, and load the model with it.

python examples/save_placement.py MODEL [placement.json]
"""

import sys

import overspill

path, *rest = sys.argv[1:]
file = rest[0] if rest else "placement.json"

planned = overspill.plan(path, n_ctx=2048, pins={"layers 0-1": "cpu"})
forecast = planned.forecast()
print(f"{forecast.verdict}: about {forecast.tokens_per_s:.1f} tokens/s")
planned.save(file)

placement = overspill.Placement.load(file)  # as JSON, to be edited by hand as well
with overspill.Model(path, n_ctx=2048, offload=placement) as model:
    print(model.placement)  # read back from llama.cpp
    for device, use in model.memory.items():
        print(f"{device}: {use.total_bytes:,} bytes")
