"""A few steps that go through every kind of kernel on a GPU, small enough for compute-sanitizer.

compute-sanitizer --tool memcheck python benchmarks/gpu_step.py
"""

import torch

import hyperopt_ext as hx

SHAPES = [(), (3,), (5, 7), (8195,)]  # ragged ends, and more than a chunk
STACKS = {
    "a record": hx.Adam() / hx.Adam(lr=1e-4) / hx.SGD(lr=1e-6),
    "traces, a cap": hx.SGD(momentum=0.9, learn="lr", horizon=10, trust=0.1) / hx.SGD(lr=1e-6),
    "a tower for each tensor": hx.AdamW(granularity="tensor") / hx.SGD(lr=1e-6),
}


def main() -> None:
    for name, stack in STACKS.items():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            params = [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in SHAPES]
            opt = hx.HyperOptimizer(params, stack)
            for step in range(3):
                for p in params:
                    p.grad = torch.ones_like(p)
                params[step].grad = None
                opt.step()
            assert all(torch.isfinite(p).all() for p in params), name
    w, lr = torch.ones(1000, device="cuda", requires_grad=True), torch.tensor(0.1, device="cuda", requires_grad=True)
    [new], _ = hx.functional.adam([w], [2 * w], None, {"lr": lr}, torch.tensor(1, device="cuda"), detach=False)
    new.sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
