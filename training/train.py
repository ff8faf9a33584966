"""Train vit_t on drawn scenes, in short runs that resume from files.

    python -m training.train --pool .data/pool --state .data/state --limit-seconds 540 --planned-seconds 1000
    torchrun --nproc-per-node 2 -m training.train ...          # a process for each GPU, one model

The learning rate and the resolution follow the seconds trained so far out of the seconds planned, so the schedule
ends where it should however fast the machine is. Optimiser moments start afresh in each run, behind a short warm-up.
"""

import argparse
import math
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from splitsam.common.architectures import ARCHITECTURES, build_sam
from training.batched import decode, embed_masks, embed_points, encode, normalise
from training.losses import mask_losses, round_loss
from training.objects import Targets, choose_targets, shrink_masks
from training.peers import Peers
from training.pool import TRAINED, Materials, draw_procedural, load_pool, redraw
from training.prompts import Prompts, correct, draw_boxes, draw_clicks, join
from training.scenes import Scenes, draw_scenes
from training.state import load_progress, save_progress

MODEL_SEED = 7
MASK_DROP_RATE = 0.25


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run; sides in pixels, batches in images of one process."""

    coarse_side: int = 512
    coarse_batch: int = 48
    fine_side: int = 1024
    fine_batch: int = 12
    coarse_share: float = 0.5
    objects: int = 8
    rounds: int = 3
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warm_up_steps: int = 150
    clip_norm: float = 1.0
    average_decay: float = 0.998
    redraw_steps: int = 100
    report_steps: int = 50
    batches_a_draw: int = 4


class Stepper:
    """One forward and backward pass; its heavy parts may be compiled."""

    def __init__(self, sam: Any, recipe: Recipe, *, compiled: bool) -> None:
        self.sam, self.recipe = sam, recipe
        self.encode, self.decode, self.losses, self.embed_masks = encode, decode, mask_losses, embed_masks
        if compiled:
            self.encode = torch.compile(encode, dynamic=False)
            self.decode = torch.compile(decode, dynamic=False)
            self.losses = torch.compile(mask_losses, dynamic=False)
            self.embed_masks = torch.compile(embed_masks, dynamic=False)

    def first_prompts(self, targets: Targets, coverage: torch.Tensor, generator: torch.Generator) -> Prompts:
        """Clicks for the first half of each image's objects, boxes for the others, in the order of the objects."""
        batch, count = targets.masks.shape[:2]
        half = count // 2
        clicks = draw_clicks(coverage.view(batch, count, *coverage.shape[1:])[:, :half].flatten(0, 1), generator)
        boxes = draw_boxes(targets.masks[:, half:].flatten(0, 1), generator)
        both = join(clicks, boxes)
        order = torch.arange(batch * count, device=coverage.device)
        image, place = order // count, order % count
        row = torch.where(place < half, image * half + place, batch * half + image * (count - half) + place - half)
        return Prompts(both.points[row], both.labels[row])

    def step(self, scenes: Scenes, targets: Targets, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss over all rounds, and a row of figures: round 1 best of three, predicted best, single; last single.

        Each figure is split into clicks and boxes: [8] float32.
        """
        sam, count = self.sam, targets.masks.shape[1]
        coverage = shrink_masks(targets.masks, scenes.images.shape[-1] // 4).flatten(0, 1)
        weight = targets.weight.flatten()
        embeddings = self.encode(sam, normalise(sam, scenes.images, scenes.valid))
        position = sam.prompt_encoder.pe_layer(embeddings.shape[-2:])[None]
        prompts = self.first_prompts(targets, coverage, generator)
        is_click = (torch.arange(len(weight), device=weight.device) % count) < count // 2
        dense = self.embed_masks(sam.prompt_encoder, torch.zeros_like(coverage)[:, None], torch.zeros_like(is_click))
        total, figures = torch.zeros((), device=weight.device), []
        for number in range(self.recipe.rounds):
            sparse = embed_points(sam.prompt_encoder, prompts.points, prompts.labels)
            sparse = F.pad(sparse, (0, 0, 0, self.recipe.rounds - 1 - number))
            present = torch.arange(sparse.shape[1], device=sparse.device) < prompts.labels.shape[1]
            logits, predicted = self.decode(sam.mask_decoder, embeddings, position, sparse, dense, present)
            losses, true_iou = self.losses(logits, coverage)
            first = number == 0
            single = torch.where(is_click & first, 0.4, 1.0)
            total = total + (round_loss(losses, true_iou, predicted, single, float(first)) * weight).sum()
            best = 1 + predicted[:, 1:].argmax(1) if first else torch.zeros_like(prompts.labels[:, 0])
            if first:
                figures += [true_iou[:, 1:].amax(1), true_iou.gather(1, best[:, None])[:, 0], true_iou[:, 0]]
            if number + 1 < self.recipe.rounds:
                chosen = logits.detach()[torch.arange(len(best), device=best.device), best].float()
                prompts = correct(prompts, chosen, coverage, generator)
                use = torch.rand(len(best), generator=generator, device=best.device) > MASK_DROP_RATE
                dense = self.embed_masks(sam.prompt_encoder, chosen[:, None], use)
        figures.append(true_iou[:, 0])
        loss = total / (weight.sum().clamp(min=1) * self.recipe.rounds)
        rows = [
            (f * weight * kind).sum() / (weight * kind).sum().clamp(min=1)
            for f in figures
            for kind in (is_click, ~is_click)
        ]
        return loss, torch.stack(rows).detach()


def make_optimiser(sam: nn.Module, recipe: Recipe, *, fused: bool) -> torch.optim.AdamW:
    """AdamW without decay on biases, norms, embeddings and positions."""
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in sam.named_parameters():
        free = parameter.ndim < 2 or any(key in name for key in ("pos", "embed.weight", "token", "point_embeddings"))
        (plain if free else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=fused)


def learning_rate(recipe: Recipe, progress: float, steps_in_run: int) -> float:
    """Warm-up in each run, then a cosine over the whole training down to a fiftieth."""
    shape = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return recipe.learning_rate * shape * min(1.0, (steps_in_run + 1) / recipe.warm_up_steps)


class Trainer:
    """The loop: draws, steps, averages, saves; its clock runs only while it trains."""

    def __init__(
        self,
        recipe: Recipe,
        materials: Materials,
        state: Path,
        device: torch.device,
        *,
        compiled: bool,
        planned_seconds: float,
        peers: Peers,
    ) -> None:
        torch.manual_seed(MODEL_SEED)
        self.sam: Any = build_sam(ARCHITECTURES["vit_t"]).to(device).train()
        self.average = {key: value.detach().clone() for key, value in self.sam.state_dict().items()}
        self.progress: dict[str, float] = {"seconds": 0.0, "steps": 0, "images": 0, "runs": 0}
        self.recipe, self.materials, self.state, self.device = recipe, materials, state, device
        self.planned_seconds, self.peers = planned_seconds, peers
        if (state / "average.0.safetensors").exists():
            weights, average, self.progress = load_progress(state)
            self.sam.load_state_dict(weights)
            self.average = {key: value.to(device) for key, value in average.items()}
        self.progress["runs"] += 1
        self.waiting: list[Scenes] = []
        self.optimiser = make_optimiser(self.sam, recipe, fused=device.type == "cuda")
        self.stepper = Stepper(self.sam, recipe, compiled=compiled)
        seed = 1000 * int(self.progress["runs"]) + int(self.progress["steps"]) + 10**6 * peers.rank
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator(device).manual_seed(seed)

    def start_from(self, checkpoint: dict[str, torch.Tensor]) -> None:
        """Take over finished weights; the schedule begins at its beginning."""
        self.sam.load_state_dict({key: value.float() for key, value in checkpoint.items()})
        self.average = {key: value.detach().clone() for key, value in self.sam.state_dict().items()}

    def stage(self) -> tuple[int, int]:
        """Side in pixels and images a batch at this point of the schedule."""
        coarse = self.progress["seconds"] < self.recipe.coarse_share * self.planned_seconds
        recipe = self.recipe
        return (recipe.coarse_side, recipe.coarse_batch) if coarse else (recipe.fine_side, recipe.fine_batch)

    def next_scenes(self) -> Scenes:
        """The next batch; several are drawn at once, because a small draw costs the host as much as a large one."""
        side, batch = self.stage()
        if not self.waiting or self.waiting[-1].images.shape[-1] != side:
            many = draw_scenes(self.materials, batch * self.recipe.batches_a_draw, side, self.rng)
            pieces = [getattr(many, field.name).split(batch) for field in fields(many)]
            self.waiting = [Scenes(*piece) for piece in zip(*pieces, strict=True)]
        return self.waiting.pop()

    def train_step(self, steps_in_run: int) -> torch.Tensor:
        """Draw, learn, average; returns [2 + 8]: loss, gradient norm and the step's figures."""
        batch = self.stage()[1]
        scenes = self.next_scenes()
        targets = choose_targets(scenes, self.recipe.objects, self.generator)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss, figures = self.stepper.step(scenes, targets, self.generator)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.recipe, self.progress["seconds"] / self.planned_seconds, steps_in_run)
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.peers.average_gradients(self.sam)
        norm = nn.utils.clip_grad_norm_(self.sam.parameters(), self.recipe.clip_norm)
        self.optimiser.step()
        decay = min(self.recipe.average_decay, (1 + self.progress["steps"]) / (10 + self.progress["steps"]))
        pairs = [(self.average[key], value.detach()) for key, value in self.sam.state_dict().items()]
        torch._foreach_lerp_([pair[0] for pair in pairs], [pair[1] for pair in pairs], 1 - decay)
        self.progress["steps"] += 1
        self.progress["images"] += batch * self.peers.count
        return torch.cat([torch.stack([loss.detach(), norm.detach()]), figures])

    def time_draw(self) -> float:
        """Milliseconds to draw one batch and choose its targets, the device's queue being empty."""
        side, batch = self.stage()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.monotonic()
        choose_targets(
            draw_scenes(self.materials, batch, side, self.rng), self.recipe.objects, self.generator
        ).weight.sum().item()
        return (time.monotonic() - start) * 1000

    def save(self) -> None:
        if self.peers.rank == 0:
            save_progress(self.state, self.sam.state_dict(), self.average, self.progress)

    def run(self, limit_seconds: float, save_seconds: float = 60.0) -> None:
        """Train until the limit or the plan's end, saving now and then."""
        start = last = saved = reported = self.peers.clock()
        rows, steps_in_run, recipe = [], 0, self.recipe
        while last - start < limit_seconds and self.progress["seconds"] < self.planned_seconds:
            if steps_in_run % recipe.redraw_steps == recipe.redraw_steps - 1:
                self.materials = redraw(self.materials, TRAINED, self.rng)
            rows.append(self.train_step(steps_in_run))
            steps_in_run += 1
            if steps_in_run % recipe.report_steps == 0:
                self.report(torch.stack(rows).mean(0).tolist(), len(rows) / (last - reported))
                rows, reported = [], last
            elif steps_in_run % 5 == 0:
                rows[-1][0].item()
            now = self.peers.clock()
            self.progress["seconds"] += now - last if steps_in_run > 3 else 0.0
            last = now
            if now - saved > save_seconds:
                self.save()
                saved = now
        self.save()
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        if self.peers.rank == 0:
            print(f"one draw takes {self.time_draw():.0f} ms; memory {memory:.1f} GiB", flush=True)

    def report(self, row: list[float], steps_a_second: float) -> None:
        """One line: where the training is and the means since the last line, clicks and boxes apart."""
        if self.peers.rank > 0:
            return
        side, batch = self.stage()
        names = ("best", "predicted", "single", "last")
        pairs = " ".join(f"{name} {row[2 + 2 * i]:.3f}/{row[3 + 2 * i]:.3f}" for i, name in enumerate(names))
        seconds, steps, images = (self.progress[name] for name in ("seconds", "steps", "images"))
        print(
            f"{seconds:7.1f} s  step {steps:6.0f}  images {images:8.0f}  {side} px"
            f" {steps_a_second * batch * self.peers.count:6.1f} img/s  loss {row[0]:.4f}  norm {row[1]:.2f}  {pairs}",
            flush=True,
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, help="folder that training.materials wrote; without it all is procedural")
    parser.add_argument("--from-checkpoint", type=Path, help="checkpoint to start from where the state folder is empty")
    parser.add_argument("--state", type=Path, required=True, help="folder of the state, read if there and written")
    parser.add_argument("--limit-seconds", type=float, required=True, help="stop training after so long")
    parser.add_argument("--planned-seconds", type=float, required=True, help="length of the whole training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the model's parts (half a minute to begin)")
    for name, value in vars(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    peers = Peers(arguments.device)
    device = peers.device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    recipe = Recipe(**{name: getattr(arguments, name) for name in vars(Recipe())})
    rng = np.random.default_rng(1)
    materials = (
        load_pool(arguments.pool / "train", TRAINED, rng, device)
        if arguments.pool
        else draw_procedural(TRAINED, rng, device)
    )
    trainer = Trainer(
        recipe,
        materials,
        arguments.state,
        device,
        compiled=arguments.compile,
        planned_seconds=arguments.planned_seconds,
        peers=peers,
    )
    if arguments.from_checkpoint and trainer.progress["steps"] == 0:
        trainer.start_from(load_file(arguments.from_checkpoint))
    trainer.run(arguments.limit_seconds)
    peers.close()


if __name__ == "__main__":
    main()
