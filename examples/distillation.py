"""Knowledge distillation: a float teacher, and a small 4-bit student that learns from its outputs too.

The student is trained in mode "qat" with cross entropy and the KL divergence to the softened outputs of the teacher
(Hinton et al. 2015, arXiv:1503.02531). Data: the handwritten digits of scikit-learn; the teacher has seen 1200 of them,
the student few of these. Run: python examples/distillation.py --seeds 20
"""

import argparse
import statistics

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import qkernels as qk

TEMPERATURE, SHARE = 4.0, 0.9


def train(model, images, labels, steps: int, soft=None) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        logits = model(images[batch])
        loss = F.cross_entropy(logits, labels[batch])
        if soft is not None:
            student, teacher = (F.log_softmax(x / TEMPERATURE, dim=-1) for x in (logits, soft[batch]))
            divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * TEMPERATURE**2
            loss = (1 - SHARE) * loss + SHARE * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", default="w4a8-g32")
    for name, number in (("seeds", 20), ("steps", 1000), ("digits", 100)):
        parser.add_argument(f"--{name}", type=int, default=number)
    options = parser.parse_args()
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images, accuracies = (images / 16 - 0.3).float(), {"teacher": [], "student alone": [], "student distilled": []}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        few, known, held_out = (order := torch.randperm(len(images)))[: options.digits], order[:1200], order[1200:]
        teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        models = {"teacher": train(teacher, images[known], labels[known], options.steps)}
        for name, soft in (("student alone", None), ("student distilled", teacher(images[few]).detach())):
            torch.manual_seed(seed)  # the same student, and the same batches
            models[name] = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
            qk.quantize_(models[name], options.scheme, mode="qat")
            qk.freeze_(train(models[name], images[few], labels[few], options.steps, soft))
        for name, model in models.items():
            accuracies[name].append((model(images[held_out]).argmax(-1) == labels[held_out]).float().mean().item())
    for name, values in accuracies.items():
        print(f"{name}: {statistics.mean(values):.3f} (over seeds: {statistics.pstdev(values):.3f})")
