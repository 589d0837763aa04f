"""Frechet distances in a trained VGG16's features (not FID), of networks of chapters 2 to 4 that learnt photographs.

    python tests/photographs.py --vgg vgg16.pth --real FOLDER runs/a/1-rf.pt:1 runs/a/1-rf.pt:8 runs/a/2-rf.pt:1

NETWORK.pt:N draws by N Euler steps (0: 10 of Heun); --figure FILE.png: the same twelve noises through each.
vgg16.pth: torchvision's file, or any with the tensors of its convolutions.
Features: the 512 means over the picture of the last convolution's outputs, of pictures resized to 64 x 64.
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from conftest import load

ch4 = load("04_distill")


def vgg_features(path):
    """A function: images (B, 3, S, S) in [-1, 1] -> features (B, 512)."""
    network = torchvision.models.vgg16(weights=None).features[:30].eval()
    state = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict({name: state["features." + name] for name in network.state_dict()})
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]

    @torch.no_grad()
    def features(images):
        images = F.interpolate(images, (64, 64), mode="bilinear")
        return network(((images + 1) / 2 - mean) / deviation).mean((2, 3))
    return features


def pictures(path, steps, count, seed):
    """count samples (N, 3, S, S) of a network by Euler steps, from the noises that chapter 2's table is made with."""
    run = ch4.Run(ch4.Config(device="cpu", seed=seed, eval_size=count, shard=100, compile=False), "04_distill.py")
    flow, stage = ch4.open_network(path, run)
    method = "heun" if not steps else "jumps" if stage in ch4.JUMPERS else "euler"
    return ch4.generate(ch4.Velocity(flow, run.config), run, steps or 10, method), run.config.image_size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vgg", required=True)
    parser.add_argument("--real", required=True, help="folder of the training pictures")
    parser.add_argument("--count", type=int, default=2000, help="samples of a network")
    parser.add_argument("--reals", type=int, default=10000, help="real pictures of the reference, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", help="file for a picture of the samples")
    parser.add_argument("networks", nargs="+", metavar="NETWORK.pt:STEPS")
    flags = parser.parse_args()
    features = vgg_features(flags.vgg)
    reference, strips = {}, {}
    for entry in flags.networks:
        path, steps = entry.rsplit(":", 1)
        images, size = pictures(path, int(steps), flags.count, flags.seed)
        strips[f"{Path(path).stem}, N = {steps}" if int(steps) else f"{Path(path).stem}, ODE"] = images[:12]
        if size not in reference:
            config = ch4.Config(data=flags.real, image_size=size)
            real = ch4.load_data(ch4.Run(config, "04_distill.py"))[0]
            order = torch.randperm(len(real), generator=torch.Generator().manual_seed(flags.seed))
            found = ch4.image_features(real[order[:flags.reals + flags.count]], features, "cpu")
            reference[size] = ch4.moments(found[:flags.reals])
            floor = ch4.frechet_from_moments(*ch4.moments(found[flags.reals:]), *reference[size])
            print(f"{flags.count} other real pictures of side {size}: {floor:.2f}", flush=True)
        distance = ch4.frechet_from_moments(*ch4.moments(ch4.image_features(images, features, "cpu")), *reference[size])
        print(f"{entry}: {distance:.2f}", flush=True)
    if flags.figure:
        ch4.draw_samples(strips, Path(flags.figure))


if __name__ == "__main__":
    main()
