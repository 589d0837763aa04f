"""What the check cells of the homework call: compare an answer with the truth and name the mistake that it looks like.

Every check gives the equation, the right value, and the values that known mistakes would give.  A wrong answer that
equals one of those is told its mistake; any other is told what was expected and what came.  What can go wrong in every
exercise is looked for here, in all of them: overwritten inputs, lost gradients, fresh noise, left-over axes, rounding.
"""
import inspect
import os
import traceback

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

SIZES = ("must match the size", "broadcast", "shape", "size of tensor")      # how torch words a missing reshape
NUMBERS = ("'float' object", "'int' object", "tensor of dimension 0")        # and a time that is no tensor (B,)


class Lesson(AssertionError):
    """What a failed check teaches.  Jupyter asks for the lines to show, and gets these alone, without a traceback."""

    def _render_traceback_(self):
        return [str(self)]


def expect(attempt, want, equation, mistakes=None, tolerance=1e-4):
    """Lesson unless attempt() equals want, and has its gradient by the weights that want was computed with.

    attempt: () -> tensor, number, or tuple of them;  want: the same.  mistakes: {what went wrong: what that gives};
    a function there is called only when it is needed.  tolerance: absolute, and relative to want.
    """
    together = isinstance(want, tuple)                      # then a list will do as well
    got, want = parts(answer(attempt, equation), equation, together), parts(want, equation)
    leaves = weights_of(want)
    if not agree(got, want, tolerance):
        leaves = []                                         # then values decide which mistake it was
        verdict = guess(got, want, tolerance)
    elif agree(gradients(got, leaves), gradients(want, leaves), 1e-4):
        return
    elif any(part.requires_grad for part in got):
        verdict = "the values are right, the gradient is not: is too much or too little detached?"
    else:
        verdict = "Likely mistake: no gradient flows to the network: the value is detached, or made under no_grad()"
    for description, value in (mistakes or {}).items():
        if looks_like(got, value, equation, tolerance, leaves):
            raise Lesson(f"{equation}\n  Likely mistake: {description}")
    if together and len(got) == len(want) and all(map(permuted, got, want)):
        verdict = "Likely mistake: the pairs are shuffled"
    elif not looks_like(got, attempt, equation, tolerance, [], together):
        verdict = "Likely mistake: noise is drawn anew, or a time: two calls with the same inputs differ"
    raise Lesson(f"{equation}\n  {verdict}")


def require(condition, message):
    """Lesson with the message unless condition holds: for mistakes that no single value shows."""
    if not condition:
        raise Lesson(message)


def answer(attempt, equation):
    """attempt(), which calls the student's function.  Lesson if that fails, overwrites its inputs or returns nothing.

    NotImplementedError (not written yet) and NameError (a cell was not run) pass through.
    """
    before = inputs(attempt)
    try:
        got = attempt()
    except (NotImplementedError, NameError) as error:
        text = f"{type(error).__name__}: {error}{place(error, attempt)}"
        error._render_traceback_ = lambda: [text]           # as a Lesson does
        raise
    except AssertionError:
        raise
    except Exception as error:
        hint = ""
        if any(word in str(error) for word in NUMBERS):
            hint = "\n  Often: a network wants t as a tensor (B,), not as a number: x.new_full((len(x),), number)."
        elif any(word in str(error) for word in SIZES):
            hint = "\n  Often: t has shape (B,) and must get trailing axes, (B, 1, ..., 1), before it meets x (B, *D)."
        text = f"Your code raised {type(error).__name__}: {first_line(error)}{place(error, attempt)}{hint}"
        raise Lesson(f"{equation}\n  {text}") from error
    for name, tensor, copy in before:
        require(torch.equal(tensor, copy), f"{equation}\n  Likely mistake: your function overwrites `{name}`, which "
                "is the caller's: x += ... and methods that end in _ change a tensor in place; write x = x + ...")
    require(got is not None, f"{equation}\n  Your function returned None: is `return` missing?")
    return got


def inputs(attempt):
    """(name, tensor, copy) of the tensors that a check's function names, in lists too."""
    found = inspect.getclosurevars(attempt)
    named = {**found.globals, **found.nonlocals}
    return [(name, part, part.detach().clone()) for name, value in named.items()
            for part in (value if isinstance(value, (list, tuple)) else [value]) if torch.is_tensor(part)]


def first_line(error):
    """The first line of an exception's text, cut to a readable length."""
    return (str(error).splitlines() or [""])[0][:200]


def place(error, attempt):
    """Where in the student's cell an exception arose; a cell is no file, and not the one that holds the check."""
    ours = attempt.__code__.co_filename
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename != ours and not os.path.exists(frame.filename)]
    return f"\n  in line {frames[-1].lineno} of {frames[-1].name}: {frames[-1].line}".rstrip(": ") if frames else ""


def watch_training(attempt, equation):
    """answer(), the number of optimizer steps that it made, and the weights after the last: of any training loop."""
    steps, weights = 0, []

    def note(optimizer, *_):
        nonlocal steps
        steps += 1
        weights[:] = [weight.detach().clone() for group in optimizer.param_groups for weight in group["params"]]
    hook = register_optimizer_step_post_hook(note)
    try:
        return answer(attempt, equation), steps, weights
    finally:
        hook.remove()


def with_weights(network, weights):
    """The network with these weights, as far as they fit."""
    for old, new in zip(network.parameters(), weights):
        if old.shape == new.shape:
            old.data.copy_(new)
    return network


def first_step(velocity, x0, x1, steps, config, asked, equation):
    """Where one step of a trained flow carries x0, and its mean squared error as a share of the variance of x1.

    steps: what watch_training counted;  asked: a list that grows when the teacher is called.  Lesson if it is no flow.
    """
    zero = x0.new_zeros(len(x0))
    asked.clear()
    with torch.no_grad():
        jump = answer(lambda: x0 + velocity(x0, zero), equation)
        require(not asked, f"{equation}\n  Likely mistake: what you return asks the teacher; return the network")
        error = ((jump - x1).square().mean() / (x1 - x1.mean(0)).square().mean()).item()
        back = ((x1 + velocity(x1, zero) - x0).square().mean() / x0.square().mean()).item()
    require(steps or error < 0.2, f"{equation}\n  Likely mistake: no training step was made: "
                                  "ch1.train(...) only works while a for loop turns over it")
    require(not 0 < steps < config.steps, f"{equation}\n  the network was trained for {steps} of {config.steps} steps")
    require(back > 0.5, f"{equation}\n  Likely mistake: the pairs are turned round: this flow carries x1 to x0")
    return jump, error


def parts(value, equation, together=True):
    """A tensor, a number, or a tuple (with `together`: a list) of them as a list of float64 tensors on the CPU."""
    try:
        several = isinstance(value, (tuple, list) if together else tuple)
        return [torch.as_tensor(part).cpu().double() for part in (value if several else [value])]
    except Exception:
        kind = type(value).__name__
        raise Lesson(f"{equation}\n  Your function returned {kind}, which is no tensor") from None


def agree(a, b, tolerance):
    """Whether two lists of tensors are equal in shapes and, up to the tolerance, in values."""
    return len(a) == len(b) and all(x.shape == y.shape and torch.allclose(x, y, tolerance, tolerance, equal_nan=True)
                                    for x, y in zip(a, b))


def weights_of(tensors):
    """The tensors by which some tensors can be differentiated: the ends of autograd's graph."""
    nodes = [part.grad_fn for part in tensors if part.grad_fn]
    for node in nodes:                                      # the list grows while we walk along it
        nodes += [before for before, _ in node.next_functions if before and before not in nodes]
    return [node.variable for node in nodes if hasattr(node, "variable")]


def gradients(tensors, leaves):
    """The gradients of the sum of some tensors by the leaves, 0 where none flows."""
    if not leaves:
        return []
    total = sum(part.sum() for part in tensors) + sum(0 * leaf.sum().cpu() for leaf in leaves)
    return parts(torch.autograd.grad(total, leaves, retain_graph=True), "")


def looks_like(got, value, equation, tolerance, leaves, together=True):
    """Whether `got` is what a mistake gives.  A mistake that cannot be computed here was not made here."""
    try:
        value = parts(value() if callable(value) else value, equation, together)
        return agree(got, value, tolerance) and agree(gradients(got, leaves), gradients(value, leaves), 1e-4)
    except Exception:
        return False


def permuted(got, want):
    """Whether the samples of `got` are those of `want`, in whatever order."""
    if got.shape != want.shape or got.dim() < 2:
        return False
    return bool((torch.cdist(got.flatten(1), want.flatten(1)).amin(1) < 1e-3).all())


def guess(got, want, tolerance):
    """What can be said of wrong values without a list of mistakes: number, axes, rounding; else where they differ."""
    if len(got) != len(want):
        return f"expected {len(want)} result(s), got {len(got)}"
    if agree(got, want, 1e-6):
        return "Likely mistake: computed in float32, which rounds at the seventh digit; float64 is wanted"
    which, x, y = next((i, x, y) for i, (x, y) in enumerate(zip(got, want), 1) if not agree([x], [y], tolerance))
    shapes = f"{tuple(y.shape)} is wanted, got {tuple(x.shape)}"
    if len(want) == 1 and y.dim() < 2 and x.dim() > y.dim():
        return f"Likely mistake: axes are left over: {shapes}. flatten(1) makes one of all axes of a sample."
    if y.dim() == 1 and x.dim() == 0:
        return f"Likely mistake: the mean over the batch too: one number a sample, {shapes}"
    first = 0
    if x.shape == y.shape:
        first = int((~torch.isclose(x, y, tolerance, tolerance)).flatten().int().argmax())
    where = f"result {which} of {len(want)}: " * (len(want) > 1)
    return f"{where}expected {show(y, first)}\n  {where}got      {show(x, first)}"


def show(tensor, first):
    """Shape and some numbers, from the first that is wrong."""
    numbers = " ".join(f"{v:.6g}" for v in tensor.flatten()[first:first + 4].tolist())
    start, more = f", from entry {first}" * (first > 0), " ..." * (tensor.numel() > first + 4)
    return f"shape {tuple(tensor.shape)}{start}: {numbers}{more}"
