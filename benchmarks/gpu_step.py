"""A few steps that go through every kind of kernel on a GPU, small enough for compute-sanitizer.

compute-sanitizer --tool memcheck python benchmarks/gpu_step.py
"""

import torch

import hyperopt_ext as hx

SHAPES = [(), (3,), (5, 7), (8195,)]  # ragged ends, and more than a chunk
MANY = [(1,)] * 2100  # several launches, and more chunks than one block adds up
STACKS = {
    "a record": (hx.Adam() / hx.Adam(lr=1e-4) / hx.SGD(lr=1e-6), SHAPES),
    "traces, a cap": (hx.SGD(momentum=0.9, learn="lr", horizon=10, trust=0.1) / hx.SGD(lr=1e-6), SHAPES),
    "a tower for each tensor": (hx.AdamW(granularity="tensor") / hx.SGD(lr=1e-6), SHAPES),
    "nothing learned": (hx.SGD(), SHAPES),
    "many tensors": (hx.Adam() / hx.SGD(lr=1e-6), MANY),
}


def main(device: str = "cuda") -> None:
    for name, (stack, shapes) in STACKS.items():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            params = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
            opt = hx.HyperOptimizer(params, stack, nonfinite="skip")
            for step in range(3):
                for p in params:
                    padded = torch.ones(p.numel() + 1, dtype=dtype, device=device)
                    p.grad = padded[step % 2 :][: p.numel()].view(p.shape)  # in one step, not aligned
                params[step].grad = None
                opt.step()
            assert all(torch.isfinite(p).all() for p in params), name
    for detach in (True, False):
        w, lr = (torch.full((n,), 0.1, device=device, requires_grad=True) for n in (1000, 1))
        step = torch.tensor(1, device=device)
        [new], _ = hx.functional.adam([w], [2 * w], None, {"lr": lr.reshape(())}, step, detach=detach)
        new.sum().backward()
        assert torch.isfinite(lr.grad).all()


if __name__ == "__main__":
    main()
