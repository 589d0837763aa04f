"""Right answers in other words than the solutions: (homework, exercise, code of the student's cell).

Each must earn the points of its exercise: other spellings, einops, numpy and loops, float64, steps in place on tensors
of its own, a list where a tuple is asked, a training loop and an average of the student's own.
"""

RIGHT_ANSWERS = [
    ("hw1", "interpolate", """
from einops import rearrange

def interpolate(x0, x1, t):
    flat0, flat1 = x0.flatten(1), x1.flatten(1)
    return ((1 - rearrange(t, "b -> b 1")) * flat0 + rearrange(t, "b -> b 1") * flat1).view_as(x0)
"""),
    ("hw1", "interpolate", """
def interpolate(x0, x1, t):
    return torch.stack([(1 - s) * a + s * b for a, b, s in zip(x0, x1, t)])
"""),
    ("hw1", "interpolate", """
def interpolate(x0, x1, t):
    x = x0.clone()
    x += t[(...,) + (None,) * (x.dim() - 1)] * (x1 - x0)
    return x
"""),
    ("hw1", "loss", """
from einops import reduce

def flow_matching_loss(velocity, x0, x1, t):
    error = velocity(ch1.interpolate(x0, x1, t), t) - (x1 - x0)
    return reduce(error ** 2, "b ... -> b", "mean")
"""),
    ("hw1", "loss", """
def flow_matching_loss(velocity, x0, x1, t):
    v = velocity(ch1.interpolate(x0, x1, t), t)
    return torch.nn.functional.mse_loss(v, (x1 - x0).detach(), reduction="none").mean(list(range(1, x0.dim())))
"""),
    ("hw1", "loss", """
def flow_matching_loss(velocity, x0, x1, t):
    xt = ch1.interpolate(x0, x1, t).requires_grad_()
    losses = [(a - b).pow(2).mean() for a, b in zip(velocity(xt, t), x1 - x0)]
    return torch.stack(losses)
"""),
    ("hw1", "euler", """
@torch.no_grad()
def euler(velocity, x0, steps):
    z, dt = x0.clone(), 1.0 / steps
    t = torch.zeros(len(z))
    for _ in range(steps):
        z += dt * velocity(z, t)
        t += dt
    return z
"""),
    ("hw1", "euler", """
def euler(velocity, x0, steps):
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    for now, after in zip(times[:-1], times[1:]):
        x0 = x0 + (after - now).float() * velocity(x0, now.float().expand(x0.shape[0]))
    return x0
"""),
    ("hw1", "euler", """
def euler(velocity, x0, steps, start=0):
    if start == steps:
        return x0
    return euler(velocity, x0 + velocity(x0, x0.new_full((len(x0),), start / steps)) / steps, steps, start + 1)
"""),
    ("hw1", "gaussian", """
def gaussian_velocity(x, t, mean, std):
    s = t.double().unsqueeze(-1)
    x0_hat = (1 - s) / ((1 - s) ** 2 + s ** 2 * std ** 2) * (x - s * mean)
    x1_hat = mean + s * std ** 2 / ((1 - s) ** 2 + s ** 2 * std ** 2) * (x - s * mean)
    return x1_hat - x0_hat
"""),
    ("hw1", "straightness", """
def straightness(path):
    n = len(path) - 1
    total = 0.0
    for a, b in zip(path[:-1], path[1:]):
        total += ((n * (b - a) - (path[-1] - path[0])) ** 2).sum() / path.shape[1]
    return float(total / n)
"""),
    ("hw2", "heun", """
def heun_step(velocity, z, t, h):
    k1 = velocity(z, t)
    trial = z.clone().add_(k1, alpha=h)
    k2 = velocity(trial, t.clone().add_(h))
    return torch.lerp(z + h * k1, z + h * k2, 0.5)
"""),
    ("hw2", "ema", """
def ema_update(average, weights, decay):
    torch._foreach_lerp_(average, [w.detach() for w in weights], 1 - decay)
"""),
    ("hw2", "ema", """
@torch.no_grad()
def ema_update(average, weights, decay):
    for i in range(len(average)):
        average[i].copy_(decay * average[i] + (1 - decay) * weights[i])
"""),
    ("hw2", "ema", """
def ema_update(average, weights, decay):
    for a, w in zip(average, weights):
        a *= decay
        a += (1 - decay) * w.data
"""),
    ("hw2", "ema", """
def ema_update(average, weights, decay):
    for a, w in zip(average, weights):
        a.mul_(decay).add_(w, alpha=1 - decay)
"""),
    ("hw2", "pairs", """
def make_pairs(model, ema, z0, steps):
    z = z0
    for i in range(steps):
        t = torch.full((len(z),), i / steps)
        a = ema(z, t)
        z = z + (a + ema(z + a / steps, t + 1 / steps)) / (2 * steps)
    return [z0, z]
"""),
    ("hw2", "pairs", """
@torch.no_grad()
def make_pairs(model, ema, z0, steps):
    *_, z1 = ch2.integrate(ema, z0.clone(), steps, method="heun")
    return z0.clone(), z1
"""),
    ("hw2", "draw", """
def draw_pairs(z0, z1, n):
    chosen = torch.multinomial(torch.ones(len(z0)), n, replacement=True)
    return [z0.index_select(0, chosen), z1.index_select(0, chosen)]
"""),
    ("hw2", "draw", """
import random

def draw_pairs(z0, z1, n):
    chosen = random.choices(list(zip(z0, z1)), k=n)
    return torch.stack([a for a, _ in chosen]), torch.stack([b for _, b in chosen])
"""),
    ("hw2", "draw", """
def draw_pairs(z0, z1, n):
    index = (torch.rand(n) * len(z0)).long()
    pairs = torch.stack([z0, z1])[:, index]
    return pairs[0], pairs[1]
"""),
    ("hw2", "reflow", """
def reflow(teacher, noise, config):
    z0, z1 = ch1.make_pairs(teacher, noise, 16)
    model = ch1.VelocityMLP(config.width, config.depth)
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.lr * (1 - step / config.steps)
        a, b = ch1.draw_stored(z0, z1, config.batch)
        loss = ch1.flow_matching_loss(model, a, b, torch.rand(config.batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            decay = min(config.ema_decay, (step + 1) / (step + 10))
            for a, w in zip(average.parameters(), model.parameters()):
                a.mul_(decay).add_(w, alpha=1 - decay)
    return average
"""),
    ("hw2", "reflow", """
def reflow(teacher, noise, config):
    z0, z1 = ch1.make_pairs(teacher, noise, 16)
    network = ch1.VelocityMLP(config.width, config.depth)

    def loss_fn(model, ema, step):
        index = torch.randint(len(z0), (config.batch,))
        return ch1.flow_matching_loss(model, z0[index], z1[index], torch.rand(config.batch))
    *_, (step, loss, ema) = ch1.train(network, loss_fn, config)
    return ema
"""),
    ("hw2", "reflow", """
def reflow(teacher, noise, config):
    z0, z1 = ch1.make_pairs(teacher, noise, 16)
    network = ch1.VelocityMLP(config.width, config.depth)
    loss_fn = partial(ch1.pair_loss, draw=partial(ch1.draw_stored, z0, z1), n=config.batch)
    for step, loss, ema in ch1.train(network, loss_fn, config):
        pass
    network.load_state_dict(ema.model.state_dict())
    return lambda x, t: network(x, t)
"""),
    ("hw3", "times", """
import numpy as np

def u_shaped(y, a):
    s = (2 * y.numpy().astype(np.float64) - 1) * np.sinh(a / 2)
    return torch.from_numpy(np.arcsinh(s) / a + 0.5)
"""),
    ("hw3", "times", """
def u_shaped(y, a):
    low, high = torch.zeros_like(y, dtype=torch.float64), torch.ones_like(y, dtype=torch.float64)
    for _ in range(50):                                    # bisection
        middle = (low + high) / 2
        below = 0.5 + torch.sinh(a * (middle - 0.5)) / (2 * math.sinh(a / 2)) < y
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
"""),
    ("hw3", "times", """
def u_shaped(y, a):
    s = (2 * y - 1) * math.sinh(a / 2)
    return 0.5 + torch.log(s + torch.sqrt(s * s + 1)) / a
"""),
    ("hw3", "huber", """
def pseudo_huber(v, target):
    B, d = v.shape[0], math.prod(v.shape[1:])
    c = 54e-5 * d
    squares = torch.einsum("bi,bi->b", (v - target).reshape(B, d), (v - target).reshape(B, d))
    return torch.sqrt(squares + c * c) / d - c / d
"""),
    ("hw3", "huber", """
def pseudo_huber(v, target):
    e = (v - target).double().reshape(len(v), -1)
    d = e.size(1)
    return torch.stack([((row @ row + (0.00054 * d) ** 2) ** 0.5 - 0.00054 * d) / d for row in e])
"""),
    ("hw3", "lpips", """
def perceptual_loss(v, x0, x1, t, lpips):
    s = t.view(-1, 1, 1, 1)
    x1_hat = (1 - s) * x0 + s * x1
    x1_hat = x1_hat + (1 - s) * v
    loss = lpips(x1, x1_hat)
    loss += ch3.pseudo_huber(x1 - x0, v) * t
    return loss
"""),
    ("hw3", "teacher", """
def denoiser_velocity(denoiser, xt, t):
    t4 = t[(slice(None),) + (None,) * (xt.ndim - 1)]
    sigma = 1 / t - 1
    y = xt / t4
    x1 = denoiser(y, sigma)
    x0 = (y - x1) / sigma.view_as(t4)
    return x1 - x0
"""),
    ("hw3", "few", """
def few_steps(velocity, x0, steps):
    x, times = x0.clone(), [i / steps for i in range(steps + 1)]
    for t, after in zip(times, times[1:]):
        x += (1 - t) * velocity(x, torch.full([len(x)], t))
        x *= after
        x += (1 - after) * x0
    return x
"""),
    ("hw4", "coefficients", """
def coefficients(sigma):
    t = (1 + sigma.double()) ** -1
    return [t, 1 - t]
"""),
    ("hw4", "distil", """
def distillation_loss(network, z0, z1):
    t = torch.zeros(z0.shape[0], dtype=z0.dtype)
    return ((network(z0, t) + z0 - z1) ** 2).view(len(z0), -1).mean(-1)
"""),
    ("hw4", "distil", """
def distillation_loss(network, z0, z1):
    landed = ch4.jump(network, z0, 0 * z0.flatten(1)[:, 0])
    return torch.linalg.vector_norm((landed - z1).flatten(1), dim=1) ** 2 / z0[0].numel()
"""),
    ("hw4", "progressive", """
@torch.no_grad()
def progressive_target(teacher, xt, t, steps):
    x = xt.clone()
    for k in range(2):
        x += teacher(x, t + k / (2 * steps)) / (2 * steps)
    return (x - xt) * steps
"""),
    ("hw4", "progressive", """
def progressive_target(teacher, xt, t, steps):
    h = 1 / (2 * steps)
    xm = xt + h * teacher(xt, t)
    xs = xm + h * teacher(xm, t + h)
    return (steps * (xs - xt)).detach()
"""),
    ("hw4", "consistency", """
def consistency_loss(network, x0, x1, t, r):
    d = x0.numel() / len(x0)
    c = 0.00054 * d ** 0.5
    student = ch4.jump(network, ch4.interpolate(x0, x1, t), t)
    target = ch4.jump(network, ch4.interpolate(x0, x1, r), r).detach()
    square = torch.stack([(a - b).pow(2).sum() for a, b in zip(student, target)])
    return (torch.sqrt(square + c ** 2) - c) / (1 / t - 1 / r)
"""),
    ("hw4", "grid", """
import numpy as np

def karras_times(n, low=0.002, high=80.0, rho=7):
    i = np.arange(n)
    sigma = (low ** (1 / rho) + i / (n - 1) * (high ** (1 / rho) - low ** (1 / rho))) ** rho
    return torch.as_tensor(1 / (1 + sigma))
"""),
    ("hw4", "grid", """
def karras_times(n, low=0.002, high=80.0, rho=7):
    a, b = low ** (1 / rho), high ** (1 / rho)
    return torch.tensor([1 / (1 + (a + i / (n - 1) * (b - a)) ** rho) for i in range(n)], dtype=torch.float64)
"""),
    ("hw4", "mean", """
def mean_flow_target(u, x0, x1, t, r):
    inputs, tangents = (ch4.interpolate(x0, x1, t), t), (x1 - x0, torch.ones_like(t))
    _, change = torch.func.jvp(lambda x, t: u(x, t, r), inputs, tangents)
    return (x1 - x0 + (r - t).reshape(-1, *[1] * (x0.dim() - 1)) * change).detach()
"""),
    ("hw4", "mean", """
@torch.no_grad()
def mean_flow_target(u, x0, x1, t, r):
    v = x1 - x0
    inputs, tangents = (ch4.interpolate(x0, x1, t), t, r), (v, torch.ones_like(t), torch.zeros_like(r))
    change = torch.autograd.functional.jvp(u, inputs, tangents)[1]
    return v + torch.einsum("b,b...->b...", r - t, change)
"""),
    ("hw4", "mean", """
import torch.autograd.forward_ad as forward

@torch.no_grad()
def mean_flow_target(u, x0, x1, t, r):
    with forward.dual_level():
        x = forward.make_dual(ch4.interpolate(x0, x1, t), x1 - x0)
        change = forward.unpack_dual(u(x, forward.make_dual(t, torch.ones(len(t))), r)).tangent
    return torch.stack([b - a + s * c for a, b, s, c in zip(x0, x1, r - t, change)])
"""),
    ("hw4", "mean", """
def mean_flow_target(u, x0, x1, t, r):                      # the line as a function of one number, a sample at a time
    def along(s, a, b, t, r):
        return u((a + (t + s) * (b - a))[None], (t + s)[None], r[None])[0]
    slope = torch.func.vmap(torch.func.jacfwd(along))(torch.zeros_like(t), x0, x1, t, r)
    return torch.stack([b - a + (end - start) * d for a, b, start, end, d in zip(x0, x1, t, r, slope.detach())])
"""),
    ("hw4", "mean", """
def mean_flow_target(u, x0, x1, t, r):                      # a central difference: to three digits
    h, v = 0.01, (x1 - x0).detach()
    with torch.no_grad():
        before, after = (u(ch4.interpolate(x0, x1, s), s, r) for s in (t - h, t + h))
    return v + (after - before) / (2 * h) * (r - t).view(-1, *[1] * (v.dim() - 1))
"""),
    ("hw4", "mean", """
@torch.inference_mode()
def mean_flow_target(u, x0, x1, t, r):                      # the way itself, (r - t) u, changes by (r - t) du/dt - u
    def way(x, t):
        return (r - t).reshape(-1, *[1] * (x.dim() - 1)) * u(x, t, r)
    xt = ch4.interpolate(x0, x1, t)
    return x1 - x0 + u(xt, t, r) + torch.func.jvp(way, (xt, t), (x1 - x0, torch.ones_like(t)))[1]
"""),
    ("hw5", "guided", """
def guided(velocity, x, t, text, null, scale):
    both = velocity(torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, null]))
    v_text, v_null = both.chunk(2)
    return scale * v_text + (1 - scale) * v_null
"""),
    ("hw5", "eps", """
from einops import rearrange

def eps_to_flow(eps, xs, a, b):
    shape = "n -> n " + "1 " * (xs.ndim - 1)
    A, B = rearrange(a, shape), rearrange(b, shape)
    x1 = (xs - B * eps) / A
    return [xs / (A + B), 1 / (1 + b / a), x1 - eps]
"""),
    ("hw5", "eps", """
def eps_to_flow(eps, xs, a, b):
    eps, xs, a, b = (value.double() for value in (eps, xs, a, b))
    column = a.reshape(-1, *[1] * (xs.dim() - 1)), b.reshape(-1, *[1] * (xs.dim() - 1))
    return xs / sum(column), a / (a + b), (xs - sum(column) * eps) / column[0]
"""),
    ("hw5", "pairs", """
def text_pairs(velocity, x0, text, null, scale, steps):
    x1 = x0.clone()
    for i in range(steps):
        t = x0.new_full((len(x0),), i / steps)
        free = velocity(x1, t, null.expand_as(text))
        x1 += (free + scale * (velocity(x1, t, text) - free)) / steps
    return [x0, x1, text]
"""),
    ("hw5", "distill", """
def distill_loss(velocity, x0, x1, text, decode, scale, lpips):
    with torch.no_grad():
        target = decode(x1 / scale)
    v = velocity(x0, torch.zeros(x0.size(0)), text)
    return lpips(decode((1 / scale) * (v + x0)), target)
"""),
    ("hw5", "straighten", """
def straighten(flow_map, texts, network, config):
    words = torch.randint(len(WORDS), (4096,))
    x0 = torch.randn(4096, *PATTERNS.shape[1:])
    x1 = torch.cat([flow_map(a, texts[b]) for a, b in zip(x0.split(512), words.split(512))])

    def loss_fn(model, ema, step):
        i = torch.randint(4096, (config.batch,))
        return ch1.flow_matching_loss(partial(model, text=texts[words[i]]), x0[i], x1[i], torch.rand(config.batch))
    *_, (_, _, ema) = ch1.train(network, loss_fn, config)
    return ema
"""),
    ("hw5", "straighten", """
import copy

def straighten(flow_map, texts, network, config):
    x0, text = torch.randn(4096, 1, 4, 4), texts[torch.randint(3, (4096,))]
    x1 = flow_map(x0, text)
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    for step in range(config.steps):
        i = torch.randint(4096, (config.batch,))
        t = torch.rand(config.batch)
        v = network(ch1.interpolate(x0[i], x1[i], t), t, text[i])
        loss = torch.nn.functional.mse_loss(v, x1[i] - x0[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        decay = min(config.ema_decay, (step + 1) / (step + 10))
        for a, w in zip(average.parameters(), network.parameters()):
            a.data.lerp_(w.data, 1 - decay)
    return average
"""),
]
