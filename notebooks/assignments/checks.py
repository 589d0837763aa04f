"""What the check cells of the homework call: compare an answer with the truth and name the mistake that it looks like.

Every check gives the equation, the right value, and the values that known mistakes would give.  A wrong answer that
equals one of those is told its mistake; any other is told what was expected and what came.
"""
import torch

SIZES = ("must match the size", "broadcast", "shape", "size of tensor")      # how torch words a missing reshape
NUMBERS = ("'float' object", "'int' object", "tensor of dimension 0")        # and a time that is no tensor (B,)


def expect(attempt, want, equation, mistakes=None, tolerance=1e-4):
    """AssertionError with a lesson in it unless attempt() equals want.

    attempt: () -> tensor, number, or tuple of them;  want: the same.  mistakes: {what went wrong: what that gives};
    a function there is called only when it is needed.  tolerance: absolute, and relative to want.
    NotImplementedError (not written yet) and NameError (a cell was not run) pass through.
    """
    try:
        got = attempt()
    except (NotImplementedError, AssertionError, NameError):
        raise
    except Exception as error:
        hint = ""
        if any(word in str(error) for word in NUMBERS):
            hint = "\n  Often: a network wants t as a tensor (B,), not as a number: x.new_full((len(x),), number)."
        elif any(word in str(error) for word in SIZES):
            hint = "\n  Often: t has shape (B,) and must get trailing axes, (B, 1, ..., 1), before it meets x (B, *D)."
        text = f"Your code raised {type(error).__name__}: {first_line(error)}{hint}"
        raise AssertionError(f"{equation}\n  {text}") from error
    together, got, want = isinstance(want, tuple), parts(got, equation), parts(want, equation)
    if agree(got, want, tolerance):
        return
    for description, value in (mistakes or {}).items():
        if looks_like(got, value, equation, tolerance):
            raise AssertionError(f"{equation}\n  Likely mistake: {description}")
    if together and len(got) == len(want) and all(map(permuted, got, want)):
        raise AssertionError(f"{equation}\n  Likely mistake: the pairs are shuffled")
    raise AssertionError(f"{equation}\n  expected {show(want)}\n  got      {show(got)}")


def require(condition, message):
    """AssertionError with the message unless condition holds: for mistakes that no single value shows."""
    if not condition:
        raise AssertionError(message)


def first_line(error):
    """The first line of an exception's text, cut to a readable length."""
    return (str(error).splitlines() or [""])[0][:200]


def parts(value, equation):
    """A tensor, a number or a tuple of them as a list of float64 tensors."""
    if value is None:
        raise AssertionError(f"{equation}\n  Your function returned None: is `return` missing?")
    try:
        return [torch.as_tensor(part).detach().double() for part in (value if isinstance(value, tuple) else (value,))]
    except Exception:
        kind = type(value).__name__
        raise AssertionError(f"{equation}\n  Your function returned {kind}, which is no tensor") from None


def agree(a, b, tolerance):
    """Whether two lists of tensors are equal in shapes and, up to the tolerance, in values."""
    return len(a) == len(b) and all(x.shape == y.shape and bool(torch.allclose(x, y, tolerance, tolerance))
                                    for x, y in zip(a, b))


def looks_like(got, value, equation, tolerance):
    """Whether `got` is what a mistake gives.  A mistake that cannot be computed here was not made here."""
    try:
        return agree(got, parts(value() if callable(value) else value, equation), tolerance)
    except Exception:
        return False


def permuted(got, want):
    """Whether the samples of `got` are those of `want`, in whatever order."""
    if got.shape != want.shape or got.dim() < 2:
        return False
    return bool((torch.cdist(got.flatten(1), want.flatten(1)).amin(1) < 1e-3).all())


def show(tensors):
    """Shapes and first numbers."""
    return ", ".join(f"shape {tuple(x.shape)}: " + " ".join(f"{v:.4g}" for v in x.flatten()[:4].tolist())
                     + (" ..." if x.numel() > 4 else "") for x in tensors)
