"""One training from random weights to a checkpoint, the tower first (dense.py), then all of it (packing.py).

Each step draws its batch from a generator of its own, seeded with the run's seed and the step. So a run that was killed
goes on as if nothing had been, from the last state that it stored.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..model import WIDTH, new_model
from .dense import DenseHead, dense_batch
from .looking import looking_loss, watch
from .muon import Muon
from .packing import IGNORED, Packer, pixel_values
from .rendered import RenderedScenes

STATE = "state.pt"


@dataclass(frozen=True)
class Stage:
    """One half of the training.

    Attributes:
        matrix_lr: of the layers' matrices, which Muon trains; the highest, for it rises over `warmup` steps and falls
            along a cosine to `final` of it.
        lr: of all other weights, which AdamW trains; likewise.
        dense_images: of a step, for the tower's own labels (dense.py); `share_of_sheets` of them are sheets.
        rows: scenes that are talked about in a step; 0: the tower alone is trained.
        tower_lr: of the vision tower, as a share of the rest's.
        share_of_crops: of the steps, those that talk about crops alone.
        dense: weight of the loss of the tower's own labels.
        looking: weight of the loss of where the language model looks (looking.py).
        boxes_after: steps in which the numbers of boxes come to count as much as other tokens. They are most of the
            loss, and until cards are found they are noise, in which all else is learnt several times slower.
    """

    steps: int
    matrix_lr: float
    lr: float
    warmup: int
    final: float
    dense_images: int
    share_of_sheets: float = 0.5
    rows: int = 0
    tower_lr: float = 1.0
    share_of_crops: float = 0.0
    dense: float = 1.0
    looking: float = 0.0
    boxes_after: int = 0


_TOWER = Stage(steps=2000, matrix_lr=0.02, lr=2e-3, warmup=100, final=0.05, dense_images=64)
_LANGUAGE = Stage(
    steps=2400,
    matrix_lr=0.02,
    lr=2e-3,
    warmup=100,
    final=0.02,
    dense_images=16,
    share_of_sheets=0.25,
    rows=16,
    tower_lr=0.3,
    share_of_crops=0.35,
    dense=0.5,
    looking=0.3,
    boxes_after=1000,
)


@dataclass(frozen=True)
class Settings:
    """What a run is: two with the same settings make the same checkpoint, up to the machine's rounding.

    Attributes:
        num_scenes: of the training split, which are seen again and again, with other questions.
        bfloat16: compute in it where that is safe; weights are float32. Faster only on a processor with instructions
            for it (AVX-512 BF16, AMX); without them ten times slower.
    """

    seed: int = 0
    num_scenes: int = 24_000
    tower: Stage = _TOWER
    language: Stage = _LANGUAGE
    bfloat16: bool = False

    @property
    def stages(self) -> dict[str, Stage]:
        return {"tower": self.tower, "language": self.language}


class Run:
    """A training in a folder, which it goes on with where there is one already.

    Args:
        folder: for rendered scenes and the state.

    Raises:
        ValueError: the folder holds a run with other settings.
    """

    def __init__(self, folder: Path, settings: Settings, *, workers: int = 2) -> None:
        self.settings = settings
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0  # spent in steps, before and after interruptions
        self._path = folder / STATE
        self._done = dict.fromkeys(settings.stages, 0)
        self._workers = workers
        self._folder = folder
        self.model: Any = new_model(settings.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self._head = DenseHead(WIDTH)
        self._optimizers: list[torch.optim.Optimizer] = []  # of the stage that is trained
        self._saved_optimizers: list[Any] = []
        if self._path.exists():
            self._load()

    @property
    def is_finished(self) -> bool:
        return all(self._done[name] == stage.steps for name, stage in self.settings.stages.items())

    def train(self, seconds_between_states: float = 60.0) -> Iterator[tuple[str, int]]:
        """Takes every step that is left; yields the stage and how many of its steps are done after each."""
        if self.is_finished:
            return
        data = RenderedScenes(self._folder, "train", self.settings.num_scenes, self._workers)
        packer = Packer()
        last_saved = time.monotonic()
        self.model.train()
        for index, (name, stage) in enumerate(self.settings.stages.items()):
            if self._done[name] == stage.steps:
                continue
            if stage.rows and not self._done[name]:  # it says a word as it sees it, to begin with
                with torch.no_grad():
                    self.model.get_output_embeddings().weight.copy_(self.model.get_input_embeddings().weight)
            if self._optimizers:  # `train` was called before
                self._saved_optimizers = [optimizer.state_dict() for optimizer in self._optimizers]
            self._optimizers = self._new_optimizers(name)
            bar = tqdm(total=stage.steps, initial=self._done[name], desc=name, unit="step")
            with bar:
                while self._done[name] < stage.steps:
                    start = time.perf_counter()
                    rng = np.random.default_rng((self.settings.seed, index, self._done[name]))
                    facts = self._step(stage, self._done[name], data, packer, rng)
                    self._done[name] += 1
                    self.seconds += time.perf_counter() - start
                    self.history.append({"stage": name, "step": self._done[name], "seconds": self.seconds, **facts})
                    bar.update()
                    bar.set_postfix({key: f"{value:.3g}" for key, value in facts.items()})
                    is_last = self._done[name] == stage.steps
                    if is_last or time.monotonic() - last_saved > seconds_between_states:
                        self.save()
                        last_saved = time.monotonic()
                    yield name, self._done[name]

    def save(self) -> None:
        """Stores the state, whole or not at all."""
        state = {
            "settings": json.dumps(asdict(self.settings)),
            "done": self._done,
            "seconds": self.seconds,
            "history": json.dumps(self.history),
            "model": self.model.state_dict(),
            "head": self._head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(self._path)

    # --- how ---

    def _load(self) -> None:
        state = torch.load(self._path, weights_only=True)
        if state["settings"] != json.dumps(asdict(self.settings)):
            raise ValueError(
                f"folder: expected a run with these settings in {self._path}, got one with {state['settings']}; choose "
                "another folder, or remove the file to begin anew"
            )
        self._done, self.seconds = state["done"], state["seconds"]
        self.history = json.loads(state["history"])
        self.model.load_state_dict(state["model"])
        self._head.load_state_dict(state["head"])
        self._saved_optimizers = state["optimizers"]

    def _new_optimizers(self, name: str) -> list[torch.optim.Optimizer]:
        """Muon and AdamW; in the middle of a stage, as they were. Of all weights: both pass over those without a
        gradient, in the tower's stage the language model's.
        """
        stage = self.settings.stages[name]
        matrices: dict[float, list[nn.Parameter]] = {}  # by their share of the learning rate
        others: dict[tuple[float, float], list[nn.Parameter]] = {}  # also by their weight decay
        for key, weight in self.model.named_parameters():
            share = stage.tower_lr if "vision_tower" in key else 1.0
            if weight.ndim == 2 and "embed" not in key and "lm_head" not in key:
                matrices.setdefault(share, []).append(weight)
            else:
                others.setdefault((share, 0.0), []).append(weight)
        for weight in self._head.parameters():
            others.setdefault((1.0, 0.05 if weight.ndim > 1 else 0.0), []).append(weight)
        muon = Muon([{"params": of, "highest": share * stage.matrix_lr} for share, of in matrices.items()], lr=0.0)
        adamw = torch.optim.AdamW(
            [
                {"params": of, "weight_decay": decay, "highest": share * stage.lr}
                for (share, decay), of in others.items()
            ],
            betas=(0.9, 0.98),
        )
        optimizers: list[torch.optim.Optimizer] = [muon, adamw]
        if self._done[name]:
            for optimizer, saved in zip(optimizers, self._saved_optimizers):
                optimizer.load_state_dict(saved)
        return optimizers

    def _step(
        self, stage: Stage, step: int, data: RenderedScenes, packer: Packer, rng: np.random.Generator
    ) -> dict[str, float]:
        share = schedule(step, stage)
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for group in groups:
            group["lr"] = share * group["highest"]
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        facts = {"lr": share * stage.matrix_lr}
        if stage.rows:
            loss, of_language = self._language_loss(stage, step, data, packer, rng)
            loss.backward()
            facts |= of_language
        loss, parts = self._dense_loss(stage, data, rng)
        (stage.dense * loss).backward()
        facts |= {"dense": float(loss.detach()), **parts}
        nn.utils.clip_grad_norm_([weight for group in groups for weight in group["params"]], 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        return facts

    def _dense_loss(
        self, stage: Stage, data: RenderedScenes, rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        batch = dense_batch(data, rng, stage.dense_images, stage.share_of_sheets)
        model = self.model.model
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bfloat16):
            features = model.vision_tower(pixel_values(batch.images)).last_hidden_state[:, 1:]
            features = model.multi_modal_projector(features)
        return self._head.loss(features, batch.labels, self.model.get_input_embeddings().weight)

    def _language_loss(
        self, stage: Stage, step: int, data: RenderedScenes, packer: Packer, rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Also its part of the tokens, the share of right ones, and how much of the attention is where it should be."""
        if rng.random() < stage.share_of_crops:
            indices = np.sort(rng.choice(len(data), 2 * stage.rows, replace=False)).tolist()
            batch = packer.crops(data, indices, rng)
        else:
            indices = np.sort(rng.choice(len(data), stage.rows, replace=False)).tolist()
            batch = packer.scenes(data, indices, rng)
        targets = batch.labels[:, 1:]
        is_learnt = targets != IGNORED
        with (
            watch(self.model) as watched,
            torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bfloat16),
        ):
            states = self.model.model(**batch.inputs, use_cache=False).last_hidden_state[:, :-1]
            logits = self.model.lm_head(states[is_learnt])
        targets = targets[is_learnt]
        of_token = F.cross_entropy(logits.float(), targets, reduction="none")
        weight = torch.where(packer.is_number[targets], weight_of_boxes(step, stage), 1.0)
        loss = (weight * of_token).sum() / weight.sum()
        facts = {"loss": float(loss.detach()), "right": float((logits.argmax(-1) == targets).float().mean())}
        if batch.looks:
            of_looks, facts["looks"] = looking_loss(watched, batch.looks)
            loss = loss + stage.looking * of_looks
        return loss, facts


def weight_of_boxes(step: int, stage: Stage) -> float:
    """Of the numbers of boxes, in the loss; others have 1."""
    return min(1.0, 0.1 + 0.9 * step / stage.boxes_after) if stage.boxes_after else 1.0


def schedule(step: int, stage: Stage) -> float:
    """The learning rates of a step, as a share of the stage's highest."""
    rising = min(1.0, (step + 1) / stage.warmup)
    falling = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return rising * (stage.final + (1 - stage.final) * falling)
