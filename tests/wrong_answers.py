"""Planted wrong answers: (homework, exercise, code of the student's cell, words that the feedback must hold).

Each is a mistake that people make, and must lose the points of its exercise and no others.
"""

REFLOW = """
def reflow(teacher, noise, config):
    z0, z1 = ch1.make_pairs(teacher, noise, 16)
    network = ch1.VelocityMLP(config.width, config.depth)
    loss_fn = partial(ch1.pair_loss, draw=partial(ch1.draw_stored, z0, z1), n=config.batch)
    for step, loss, ema in ch1.train(network, loss_fn, config):
        pass
    return ema.model
"""
MEAN_FLOW = """
def mean_flow_target(u, x0, x1, t, r):
    xt, v = ch4.interpolate(x0, x1, t), x1 - x0
    with torch.no_grad():
        change = torch.func.jvp(u, (xt, t, r), (v, torch.ones_like(t), torch.zeros_like(r)))[1]
    return v + (r - t).reshape(-1, *[1] * (v.dim() - 1)) * change
"""
STRAIGHTEN = """
def straighten(flow_map, texts, network, config):
    x0, text = torch.randn(4096, 1, 4, 4), texts[torch.randint(3, (4096,))]
    x1 = flow_map(x0, text)

    def loss_fn(model, ema, step):
        i = torch.randint(4096, (config.batch,))
        return ch1.flow_matching_loss(partial(model, text=text[i]), x0[i], x1[i], torch.rand(config.batch))
    for step, loss, ema in ch1.train(network, loss_fn, config):
        pass
    return ema.model
"""
LOOP = """for step, loss, ema in ch1.train(network, loss_fn, config):
        pass
    return ema.model"""
INDEX = "i = torch.randint(4096, (config.batch,))"
TWO = "i, j = torch.randint(4096, (2, config.batch))"      # who belongs to whom is lost


def spoilt(right, *changes):
    """A right answer with some mistakes made in it.  changes: (what stands there, what stands there then)."""
    for old, new in changes:
        assert right.count(old) == 1
        right = right.replace(old, new)
    return right


WRONG_ANSWERS = [
    ("hw1", "interpolate", """
def interpolate(x0, x1, t):
    return (1 - t) * x0 + t * x1
""", "t is not broadcast"),
    ("hw1", "interpolate", """
def interpolate(x0, x1, t):
    t = t.reshape(-1, *[1] * (x0.dim() - 1))
    return t * x0 + (1 - t) * x1
""", "t and 1 - t are exchanged"),
    ("hw1", "interpolate", """
def interpolate(x0, x1, t):
    return (1 - t[:, None]) * x0 + t[:, None] * x1      # points only
""", "an image needs (B, 1, 1, 1)"),
    ("hw1", "interpolate", """
def interpolate(x0, x1, t):
    xt = ch1.interpolate(x0, x1, t)
""", "is `return` missing"),
    ("hw1", "interpolate", """
def interpolate(x0, x1, t):
    x0 -= t.reshape(-1, *[1] * (x0.dim() - 1)) * (x0 - x1)
    return x0
""", "overwrites `x0`"),
    ("hw1", "loss", """
def flow_matching_loss(velocity, x0, x1, t):
    return (velocity(ch1.interpolate(x0, x1, t), t) - (x0 - x1)).square().flatten(1).mean(1)
""", "the target is reversed"),
    ("hw1", "loss", """
def flow_matching_loss(velocity, x0, x1, t):
    return (velocity(x1, t) - (x1 - x0)).square().flatten(1).mean(1)
""", "fed x1 in place of x_t"),
    ("hw1", "loss", """
def flow_matching_loss(velocity, x0, x1, t):
    return (velocity(ch1.interpolate(x0, x1, t), t) - (x1 - x0)).square().mean()
""", "the mean over the batch too"),
    ("hw1", "loss", """
def flow_matching_loss(velocity, x0, x1, t):
    return (velocity(ch1.interpolate(x0, x1, t), t) - (x1 - x0)).square().flatten(1).sum(1)
""", "the sum over the coordinates"),
    ("hw1", "loss", """
def flow_matching_loss(velocity, x0, x1, t):
    return (velocity(x0, t) - (x1 - x0)).square().flatten(1).mean(1)
""", "fed x0 in place of x_t"),
    ("hw1", "loss", """
def flow_matching_loss(velocity, x0, x1, t):
    return (velocity(ch1.interpolate(x0, x1, t), t) - (x1 - x0)).square().mean(0)
""", "the mean over the batch, dimension 0"),
    ("hw1", "loss", """
def flow_matching_loss(velocity, x0, x1, t):
    with torch.no_grad():
        return (velocity(ch1.interpolate(x0, x1, t), t) - (x1 - x0)).square().flatten(1).mean(1)
""", "no gradient flows"),
    ("hw1", "loss", """
def flow_matching_loss(velocity, x0, x1, t):
    return (velocity(ch1.interpolate(x0, x1, t), t) - x1).square().flatten(1).mean(1)
""", "the target is x1"),
    ("hw1", "loss", """
def flow_matching_loss(velocity, x0, x1, t):
    return (velocity(ch1.interpolate(x0, x1, t), t) - x0).square().flatten(1).mean(1)
""", "the target is x0"),
    ("hw1", "loss", """
def flow_matching_loss(velocity, x0, x1, t):
    return (velocity(ch1.interpolate(x0, x1, t), t) - (x1 - x0)).square().mean(-1)
""", "axes are left over"),
    ("hw1", "loss", """
def flow_matching_loss(velocity, x0, x1, t):
    return (velocity(ch1.interpolate(x0, x1, t), t) - (x1 - x0)).square().sum(1)
""", "the sum over the coordinates"),
    ("hw1", "euler", """
def euler(velocity, x0, steps):
    for i in range(steps):
        x0 = x0 + velocity(x0, x0.new_full((len(x0),), i / steps))
    return x0
""", "the step is not divided by N"),
    ("hw1", "euler", """
def euler(velocity, x0, steps):
    for i in range(1, steps + 1):
        x0 = x0 + velocity(x0, x0.new_full((len(x0),), i / steps)) / steps
    return x0
""", "the velocity is taken at the end of each step"),
    ("hw1", "euler", """
def euler(velocity, x0, steps):
    for i in range(steps):
        x0 = x0 + velocity(x0, i / steps) / steps
    return x0
""", "a network wants t as a tensor (B,)"),
    ("hw1", "euler", """
def euler(velocity, x0, steps):
    for t in torch.linspace(0, 1, steps):
        x0 = x0 + velocity(x0, t.expand(len(x0))) / steps
    return x0
""", "a grid that ends at 1"),
    ("hw1", "euler", """
def euler(velocity, x0, steps):
    for i in range(steps):
        x0 += velocity(x0, x0.new_full((len(x0),), i / steps)) / steps
    return x0
""", "overwrites `x0`"),
    ("hw1", "euler", """
def euler(velocity, x0, steps):
    z = x0
    for i in range(steps):
        z = z + velocity(z, x0.new_full((len(x0),), 1 - i / steps)) / steps
    return z
""", "time runs from 1 to 0"),
    ("hw1", "gaussian", """
def gaussian_velocity(x, t, mean, std):
    t = t[:, None]
    return mean + (t * std ** 2 + (1 - t)) / ((1 - t) ** 2 + (t * std) ** 2) * (x - t * mean)
""", "the sign of x0's term"),
    ("hw1", "gaussian", """
def gaussian_velocity(x, t, mean, std):
    t = t[:, None]
    return mean + (t * std ** 2 - (1 - t)) / ((1 - t) + t * std ** 2) * (x - t * mean)
""", "Var(x_t) has squares"),
    ("hw1", "straightness", """
def straightness(path):
    return (path.diff(dim=0) - (path[-1] - path[0])).square().flatten(2).sum(2).mean()
""", "displacements are not turned into velocities"),
    ("hw1", "straightness", """
def straightness(path):
    return (path.diff(dim=0) * (len(path) - 1) - (path[-1] - path[0])).square().mean()
""", "the mean over the coordinates"),
    ("hw2", "heun", """
def heun_step(velocity, z, t, h):
    v = velocity(z, t)
    return z + h * (v + velocity(z + h * v, t)) / 2
""", "the second slope is taken at time t"),
    ("hw2", "heun", """
def heun_step(velocity, z, t, h):
    return z + h * velocity(z, t)
""", "Euler's step"),
    ("hw2", "heun", """
def heun_step(velocity, z, t, h):
    return z + h / 2 * (velocity(z, t) + velocity(z, t + h))
""", "at z, not at the trial point"),
    ("hw2", "heun", """
def heun_step(velocity, z, t, h):
    first = velocity(z, t)
    z += h * first
    return z + h / 2 * (velocity(z, t + h) - first)
""", "overwrites `z`"),
    ("hw2", "ema", """
def ema_update(average, weights, decay):
    for a, w in zip(average, weights):
        a = decay * a + (1 - decay) * w
""", "the tensors did not change"),
    ("hw2", "ema", """
def ema_update(average, weights, decay):
    for a, w in zip(average, weights):
        a.lerp_(w.detach(), decay)
""", "the decay stands at the weights"),
    ("hw2", "ema", """
def ema_update(average, weights, decay):
    for i, w in enumerate(weights):
        average[i] = decay * average[i] + (1 - decay) * w
""", "the tensors did not change"),
    ("hw2", "ema", """
def ema_update(average, weights, decay):
    for a, w in zip(average, weights):
        w.data.mul_(1 - decay)
        a.mul_(decay).add_(w.data)
""", "overwrites `w`"),
    ("hw2", "pairs", """
def make_pairs(model, ema, z0, steps):
    return z0, ch2.integrate(model, z0, steps, "heun")[-1]
""", "the EMA is not used"),
    ("hw2", "pairs", """
def make_pairs(model, ema, z0, steps):
    return z0, ch2.integrate(ema, z0[torch.randperm(len(z0))], steps, "heun")[-1]
""", "the pairs are shuffled"),
    ("hw2", "pairs", """
def make_pairs(model, ema, z0, steps):
    return z0, ch2.integrate(ema, z0, steps)[-1]
""", "Euler's method"),
    ("hw2", "pairs", """
def make_pairs(model, ema, z0, steps):
    z0 = torch.randn_like(z0)
    return z0, ch2.integrate(ema, z0, steps, "heun")[-1]
""", "drawn anew"),
    ("hw2", "draw", """
def draw_pairs(z0, z1, n):
    return z0[torch.randint(len(z0), (n,))], z1[torch.randint(len(z1), (n,))]
""", "the pairs are shuffled"),
    ("hw2", "draw", """
def draw_pairs(z0, z1, n):
    return z0[:n], z1[:n]
""", "always the first n pairs"),
    ("hw2", "draw", """
def draw_pairs(z0, z1, n):
    index = (torch.randint(len(z0), (1,)) + torch.arange(n)) % len(z0)
    return z0[index], z1[index]
""", "neighbours"),
    ("hw2", "reflow", """
def reflow(teacher, noise, config):
    z0, z1 = ch1.make_pairs(teacher, noise, 16)
    network = ch1.VelocityMLP(config.width, config.depth)
    draw = partial(ch1.draw_stored, z0, z1[torch.randperm(len(z1))])
    loss_fn = partial(ch1.pair_loss, draw=draw, n=config.batch)
    for step, loss, ema in ch1.train(network, loss_fn, config):
        pass
    return ema.model
""", "the pairs are shuffled"),
    ("hw2", "reflow", spoilt(REFLOW, ("return ema.model", "return network")), "the EMA is not used"),
    ("hw2", "reflow", """
def reflow(teacher, noise, config):
    return lambda x, t: (ch1.integrate(teacher, x, 16, "heun")[-1] - x)
""", "asks the teacher"),
    ("hw2", "reflow", spoilt(REFLOW, ("return ema.model", "return network.requires_grad_(False)")),
     "the EMA is not used"),
    ("hw2", "reflow", spoilt(REFLOW, (LOOP, "training = ch1.train(network, loss_fn, config)\n    return network")),
     "no training step"),
    ("hw2", "reflow", spoilt(REFLOW, (
        LOOP, "step, loss, ema = next(ch1.train(network, loss_fn, config))\n    return ema.model")),
     "trained for 1 of 120 steps"),
    ("hw2", "reflow", spoilt(REFLOW, ("z0, z1)", "z1, z0)")), "the pairs are turned round"),
    ("hw3", "times", """
def u_shaped(y, a):
    return 0.5 + torch.asinh((2 * y - 1) * math.sinh(a)) / a
""", "sinh(a) in place of sinh(a/2)"),
    ("hw3", "times", """
def u_shaped(y, a):
    return 0.5 + torch.sinh(a * (y - 0.5)) / (2 * math.sinh(a / 2))
""", "the CDF itself"),
    ("hw3", "huber", """
def pseudo_huber(v, target):
    d = v[0].numel()
    c = 0.00054 * d ** 0.5
    return (((v - target).flatten(1).square().sum(1) + c ** 2).sqrt() - c) / d
""", "the constant has sqrt(d)"),
    ("hw3", "huber", """
def pseudo_huber(v, target):
    c = 0.00054 * v[0].numel()
    return ((v - target).flatten(1).square().sum(1) + c ** 2).sqrt() - c
""", "the division by d is missing"),
    ("hw3", "huber", """
def pseudo_huber(v, target):
    c = 0.00054 * v[0].numel() ** 0.5
    return ((v - target).flatten(1).square().sum(1) + c ** 2).sqrt() - c
""", "the loss of consistency models"),
    ("hw3", "huber", """
def pseudo_huber(v, target):
    d = v[0].numel()
    c = 0.00054 * d
    return (((v - target).detach().flatten(1).square().sum(1) + c ** 2).sqrt() - c) / d
""", "no gradient flows"),
    ("hw3", "huber", """
def pseudo_huber(v, target):
    d = v[0].numel()
    c = 0.00054 * d
    return (((v - target).square().sum(1) + c ** 2).sqrt() - c) / d
""", "axes are left over"),
    ("hw3", "lpips", """
def perceptual_loss(v, x0, x1, t, lpips):
    return t * ch3.pseudo_huber(v, x1 - x0) + lpips(ch3.interpolate(x0, x1, t), x1)
""", "LPIPS compares x1 with x_t"),
    ("hw3", "lpips", """
def perceptual_loss(v, x0, x1, t, lpips):
    x1_hat = ch3.interpolate(x0, x1, t) + (1 - t).reshape(-1, 1, 1, 1) * v
    return (1 - t) * ch3.pseudo_huber(v, x1 - x0) + lpips(x1_hat, x1)
""", "1 - t for a weight"),
    ("hw3", "lpips", """
def perceptual_loss(v, x0, x1, t, lpips):
    x1_hat = ch3.interpolate(x0, x1, t) + (1 - t).reshape(-1, 1, 1, 1) * v.detach()
    return t * ch3.pseudo_huber(v, x1 - x0) + lpips(x1_hat, x1)
""", "the gradient is not"),
    ("hw3", "lpips", """
def perceptual_loss(v, x0, x1, t, lpips):
    with torch.no_grad():
        x1_hat = ch3.interpolate(x0, x1, t) + (1 - t).reshape(-1, 1, 1, 1) * v
        return t * ch3.pseudo_huber(v, x1 - x0) + lpips(x1_hat, x1)
""", "no gradient flows"),
    ("hw3", "lpips", """
def perceptual_loss(v, x0, x1, t, lpips):
    x1_hat = ch3.interpolate(x0, x1, t) - t.reshape(-1, 1, 1, 1) * v
    return (1 - t) * ch3.pseudo_huber(v, x1 - x0) + lpips(x1_hat, x1)
""", "the paper's time"),
    ("hw3", "teacher", """
def denoiser_velocity(denoiser, xt, t):
    time = t.reshape(-1, *[1] * (xt.dim() - 1))
    return (denoiser(xt, (1 - t) / t) - xt) / (1 - time)
""", "fed x_t in place of y"),
    ("hw3", "teacher", """
def denoiser_velocity(denoiser, xt, t):
    time = t.reshape(-1, *[1] * (xt.dim() - 1))
    return (denoiser(xt / time, (1 - t) / t) - xt) / time
""", "the difference is divided by t"),
    ("hw3", "few", """
def few_steps(velocity, x0, steps):
    return ch3.integrate(velocity, x0, steps)[-1]
""", "Euler's rule"),
    ("hw3", "few", """
def few_steps(velocity, x0, steps):
    x = x0
    for i in range(steps):
        t, after = i / steps, (i + 1) / steps
        x1_hat = x + (1 - t) * velocity(x, x0.new_full((len(x0),), t))
        x = (1 - after) * x + after * x1_hat
    return x
""", "the present x in place of the first noise"),
    ("hw4", "coefficients", """
def coefficients(sigma):
    return sigma / (1 + sigma), 1 / (1 + sigma)
""", "c_skip and c_out are exchanged"),
    ("hw4", "distil", """
def distillation_loss(network, z0, z1):
    return (z0 + network(z0, torch.ones(len(z0))) - z1).square().flatten(1).mean(1)
""", "noise stands at t = 1"),
    ("hw4", "distil", """
def distillation_loss(network, z0, z1):
    t = torch.rand(len(z0))
    return (z0 + network(z0, t) - z1).square().flatten(1).mean(1)
""", "t is not exactly 0"),
    ("hw4", "distil", """
def distillation_loss(network, z0, z1):
    return (network(z0, z0.new_zeros(len(z0))) - z1).square().flatten(1).mean(1)
""", "v is compared with z1"),
    ("hw4", "distil", """
def distillation_loss(network, z0, z1):
    return (z0 - network(z0, z0.new_zeros(len(z0))) - z1).square().flatten(1).mean(1)
""", "the step is reversed"),
    ("hw4", "distil", """
def distillation_loss(network, z0, z1):
    with torch.no_grad():
        landed = z0 + network(z0, z0.new_zeros(len(z0)))
    return (landed - z1).square().flatten(1).mean(1)
""", "no gradient flows"),
    ("hw4", "distil", """
def distillation_loss(network, z0, z1):
    return (z0 + network(z0, torch.full((len(z0),), 1e-5)) - z1).square().flatten(1).mean(1)
""", "t is not exactly 0"),
    ("hw4", "progressive", """
def progressive_target(teacher, xt, t, steps):
    with torch.no_grad():
        v = teacher(xt, t)
        return (v + teacher(xt + v / (2 * steps), t)) / 2
""", "at time t in place of m"),
    ("hw4", "progressive", """
def progressive_target(teacher, xt, t, steps):
    v = teacher(xt, t)
    return (v + teacher(xt + v / (2 * steps), t + 0.5 / steps)) / 2
""", "a gradient flows into the target"),
    ("hw4", "progressive", """
def progressive_target(teacher, xt, t, steps):
    with torch.no_grad():
        return (teacher(xt, t) + teacher(xt, t + 0.5 / steps)) / 2
""", "starts at x_t in place of x_m"),
    ("hw4", "consistency", """
def consistency_loss(network, x0, x1, t, r):
    c = 0.00054 * x0[0].numel()
    a = ch4.jump(network, ch4.interpolate(x0, x1, t), t)
    b = ch4.jump(network, ch4.interpolate(x0, x1, r), r).detach()
    return t * r / (r - t) * (((a - b).flatten(1).square().sum(1) + c ** 2).sqrt() - c)
""", "the constant has d in place of sqrt(d)"),
    ("hw4", "consistency", """
def consistency_loss(network, x0, x1, t, r):
    c = 0.00054 * x0[0].numel() ** 0.5
    a = ch4.jump(network, ch4.interpolate(x0, x1, t), t)
    b = ch4.jump(network, ch4.interpolate(x0, x1, r), r)
    return t * r / (r - t) * (((a - b).flatten(1).square().sum(1) + c ** 2).sqrt() - c)
""", "the target is not detached"),
    ("hw4", "consistency", """
def consistency_loss(network, x0, x1, t, r):
    c = 0.00054 * x0[0].numel() ** 0.5
    a = ch4.jump(network, ch4.interpolate(x0, x1, t), t)
    b = ch4.jump(network, ch4.interpolate(torch.randn_like(x0), x1, r), r).detach()
    return t * r / (r - t) * (((a - b).flatten(1).square().sum(1) + c ** 2).sqrt() - c)
""", "noise is drawn anew"),
    ("hw4", "grid", """
def karras_times(n, low=0.002, high=80.0, rho=7):
    root = torch.linspace(high ** (1 / rho), low ** (1 / rho), n, dtype=torch.float64)
    return 1 / (1 + root ** rho)
""", "the order is reversed"),
    ("hw4", "grid", """
def karras_times(n, low=0.002, high=80.0, rho=7):
    root = torch.linspace(low ** (1 / rho), high ** (1 / rho), n)
    return 1 / (1 + root ** rho)
""", "computed in float32"),
    ("hw4", "mean", spoilt(MEAN_FLOW, ("r - t", "t - r")), "the sign"),
    ("hw4", "mean", spoilt(MEAN_FLOW, ("(r - t).reshape(-1, *[1] * (v.dim() - 1)) * ", "")),
     "not multiplied by r - t"),
    ("hw4", "mean", spoilt(MEAN_FLOW, ("r - t", "1 - t")), "the weight is 1 - t"),
    ("hw4", "mean", spoilt(MEAN_FLOW, ("ones_like(t)", "zeros_like(t)")), "the derivative by t is missing"),
    ("hw4", "mean", spoilt(MEAN_FLOW, ("(v, torch.ones", "(0 * v, torch.ones")), "the derivative by x is missing"),
    ("hw4", "mean", spoilt(MEAN_FLOW, ("zeros_like(r)", "ones_like(r)")), "r moves too"),
    ("hw4", "mean", spoilt(MEAN_FLOW, ("(v, torch.ones", "(u(xt, t, r), torch.ones")), "taken along u: x moves"),
    ("hw4", "mean", spoilt(MEAN_FLOW, ("(v, torch.ones", "(u(xt, t, t), torch.ones")), "theory allows it"),
    ("hw4", "mean", spoilt(MEAN_FLOW, ("ch4.interpolate(x0, x1, t)", "x0")), "taken at x0"),
    ("hw4", "mean", spoilt(MEAN_FLOW, ("ch4.interpolate(x0, x1, t)", "x1")), "taken at x1"),
    ("hw4", "mean", spoilt(MEAN_FLOW, ("with torch.no_grad()", "if True")), "a gradient flows into the target"),
    ("hw4", "mean", spoilt(MEAN_FLOW, ("return v +", "return")), "x1 - x0 is missing"),
    ("hw4", "mean", spoilt(MEAN_FLOW, ("return v +", "return u(xt, t, r).detach() +")), "stands in place of u"),
    ("hw4", "mean", spoilt(MEAN_FLOW, (", x1 - x0", ", x0 - x1")), "turned round"),
    ("hw4", "mean", spoilt(MEAN_FLOW, ("[1]\n", "[0]\n")), "the second is wanted"),
    ("hw4", "mean", spoilt(MEAN_FLOW, ("(xt, t, r), (v, torch.ones_like(t), torch.zeros_like(r))",
                                       "(xt, r, t), (v, torch.zeros_like(r), torch.ones_like(t))")),
     "the times are exchanged"),
    ("hw4", "mean", spoilt(MEAN_FLOW, (".reshape(-1, *[1] * (v.dim() - 1))", "")), "must get trailing axes"),
    ("hw4", "mean", """
def mean_flow_target(u, x0, x1, t, r):
    v, wide = x1 - x0, [-1, *[1] * (x0.dim() - 1)]
    xt, time = ch4.interpolate(x0, x1, t).requires_grad_(), t.clone().requires_grad_()
    by_x, by_t = torch.autograd.grad(u(xt, time, r).sum(), (xt, time))
    return v + (r - t).reshape(wide) * (by_x * v + by_t.reshape(wide))
""", "adds up all outputs"),
    ("hw4", "mean", """
def mean_flow_target(u, x0, x1, t, r):
    v, wide = x1 - x0, [-1, *[1] * (x0.dim() - 1)]
    xt = ch4.interpolate(x0, x1, t)
    by_x = torch.autograd.functional.vjp(lambda x: u(x, t, r), xt, torch.ones_like(xt))[1]
    by_t = torch.func.jvp(lambda t: u(xt, t, r), (t,), (torch.ones_like(t),))[1].detach()
    return v + (r - t).reshape(wide) * (by_x * v + by_t)
""", "with all those of x"),
    ("hw4", "mean", """
def mean_flow_target(u, x0, x1, t, r):
    v, h = x1 - x0, 0.01
    with torch.no_grad():
        change = (u(ch4.interpolate(x0, x1, t + h), t + h, r) - u(ch4.interpolate(x0, x1, t), t, r)) / h
    return v + (r - t).reshape(-1, *[1] * (v.dim() - 1)) * change
""", "du/dt is (48, 12)"),
    ("hw5", "guided", """
def guided(velocity, x, t, text, null, scale):
    v = velocity(x, t, text)
    return v + scale * (v - velocity(x, t, null))
""", "the scale is counted from the text"),
    ("hw5", "eps", """
def eps_to_flow(eps, xs, a, b):
    A, B = (s.reshape(-1, *[1] * (xs.dim() - 1)) for s in (a, b))
    return xs / (A + B), a / (a + b), eps - (xs - B * eps) / A
""", "v is reversed"),
    ("hw5", "eps", """
def eps_to_flow(eps, xs, a, b):
    A, B = (s.reshape(-1, *[1] * (xs.dim() - 1)) for s in (a, b))
    return xs, a / (a + b), (xs - B * eps) / A - eps
""", "x_t is x_s divided by a + b"),
    ("hw5", "pairs", """
def text_pairs(velocity, x0, text, null, scale, steps):
    return x0, ch5.integrate(partial(velocity, text=text), x0, steps)[-1], text
""", "guidance is not applied"),
    ("hw5", "pairs", """
def text_pairs(velocity, x0, text, null, scale, steps):
    flow = partial(ch5.guided(velocity, scale), text=text, null=null)
    return torch.randn_like(x0), ch5.integrate(flow, x0, steps)[-1], text
""", "drawn anew"),
    ("hw5", "distill", """
def distill_loss(velocity, x0, x1, text, decode, scale, lpips):
    z = x0 + velocity(x0, torch.ones(len(x0)), text)
    return lpips(decode(z / scale), decode(x1 / scale))
""", "noise stands at t = 1"),
    ("hw5", "distill", """
def distill_loss(velocity, x0, x1, text, decode, scale, lpips):
    return lpips(x0 + velocity(x0, torch.zeros(len(x0)), text), x1)
""", "LPIPS compares latents"),
    ("hw5", "distill", """
def distill_loss(velocity, x0, x1, text, decode, scale, lpips):
    landed = x0 - velocity(x0, x0.new_zeros(len(x0)), text)
    return lpips(decode(landed / scale), decode(x1 / scale))
""", "the step is reversed"),
    ("hw5", "distill", """
def distill_loss(velocity, x0, x1, text, decode, scale, lpips):
    with torch.no_grad():
        landed = x0 + velocity(x0, x0.new_zeros(len(x0)), text)
        return lpips(decode(landed / scale), decode(x1 / scale))
""", "no gradient flows"),
    ("hw5", "distill", """
def distill_loss(velocity, x0, x1, text, decode, scale, lpips):
    landed = x0 + velocity(x0, x0.new_zeros(len(x0)), text)
    return lpips(decode(landed) / scale, decode(x1) / scale)
""", "the pictures are divided by the scale"),
    ("hw5", "straighten", spoilt(STRAIGHTEN, (INDEX, TWO), ("x1[i]", "x1[j]"), ("text[i]", "text[j]")),
     "the pairs are shuffled"),
    ("hw5", "straighten", spoilt(STRAIGHTEN, (INDEX, TWO), ("text[i]", "text[j]")), "the texts are shuffled"),
    ("hw5", "straighten", spoilt(STRAIGHTEN, (INDEX, f"{INDEX}\n        t = torch.zeros(config.batch)"),
                                 ("torch.rand(config.batch)", "t")),
     "t = 0 only"),
    ("hw5", "straighten", spoilt(STRAIGHTEN, (
        LOOP, "training = ch1.train(network, loss_fn, config)\n    return network")),
     "no training step"),
    ("hw5", "straighten", spoilt(STRAIGHTEN, ("x0[i], x1[i]", "x1[i], x0[i]")), "the pairs are turned round"),
    ("hw5", "straighten", spoilt(STRAIGHTEN, ("return ema.model", "return network.requires_grad_(False)")),
     "the EMA is not used"),
]
