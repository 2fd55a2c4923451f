"""The Feature Fusion Vision Transformer, and the plain ViT that it extends.

Read `FFVT.forward_features_with_selection` beside figure 1 of the paper.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ffvt.criteria import Criterion, find
from ffvt.errors import printable, require
from ffvt.model.config import FFVTConfig, replace_fields
from ffvt.model.config_files import read_config, write_config
from ffvt.model.hub import WEIGHTS_FILE, locate, push
from ffvt.model.layers import (
    LAYER_NORM_EPS,
    MLP,
    Block,
    ClassBlock,
    Dropout,
    ObservedBlock,
    PatchEmbed,
    PrunedSelectingBlock,
    SelectingBlock,
)
from ffvt.model.reduction import TokenReduction
from ffvt.model.selection import Picker, SelectingModel, Selection
from ffvt.model.weight_files import check_header, existing_file
from ffvt.model.weights import load_own_weights

log = logging.getLogger("ffvt")


class ViT(nn.Module):
    """The plain Vision Transformer: its last block's class token is classified.

    `forward` takes images (B, 3, S, S) and returns logits (B, num_classes). There is no loss inside.

    Raises:
        ValueError: the configuration is of another kind, an `FFVT` or a `TransFG`.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021 (arXiv 2010.11929).
    """

    kind: ClassVar[str] = "vit"

    def __init__(self, config: FFVTConfig) -> None:
        super().__init__()
        must = f"{self.kind!r} (ffvt.create_model makes any)"
        require(config.kind == self.kind, type(self).__name__, "kind", must, config.kind)
        self.config = config
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, dim))
        self.dropout = Dropout(config.dropout)
        self._make_blocks(config)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(dim, config.num_classes)
        self._init_weights()

    def _make_blocks(self, config: FFVTConfig) -> None:
        kinds = [ObservedBlock if config.reduces(number) else Block for number in range(config.depth - 1)]
        last = ClassBlock if config.prune_dead_rows else Block
        self.blocks = nn.ModuleList(kind(config) for kind in (*kinds, last))

    def _init_weights(self) -> None:
        """As the authors: Xavier in the MLPs, PyTorch's own in attention, a zero head. Positions start at std 0.02."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for linear in (linear for mlp in self.modules() if isinstance(mlp, MLP) for linear in (mlp.fc1, mlp.fc2)):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, need_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        features = self.forward_features(images)
        return (self.head(features), features) if need_features else self.head(features)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> what `head` sees, (B, C)."""
        x, reduction = self.embed(images), TokenReduction(self.config.keep_rate)  # (B, N, C)
        for number, block in enumerate(self.blocks):
            x = self.run(block, x)
            if self.config.reduces(number):
                x = reduction.reduce(*x)
        return self.norm(x[:, 0])

    def forward_with_selection(self, images: Tensor) -> tuple[Tensor, Selection]:
        """An `FFVT` has it.

        Raises:
            ValueError: always, a plain ViT picks nothing.
        """
        raise ValueError("FFVT: forward_with_selection needs feature_fusion=True; got feature_fusion=False")

    @property
    def transformer_blocks(self) -> list[nn.Module]:
        """The blocks, first to last."""
        return list(self.blocks)

    def run(self, block: nn.Module, x: Tensor) -> Any:
        """What a block gives out, under activation checkpointing if that is on."""
        return checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)

    @property
    def recomputes(self) -> bool:
        """Whether each block runs under activation checkpointing."""
        return self.config.gradient_checkpointing and torch.is_grad_enabled()

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> class token and patches with their positions, (B, N, C)."""
        patches = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return self.dropout(x + self.pos_embed)

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes model.safetensors and config.json into `folder` (made if missing).

        state_dict: the weights to write instead of the model's own, such as those put together from shards.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict() if state_dict is None else state_dict
        save_file({name: t.detach().cpu().contiguous() for name, t in weights.items()}, folder / WEIGHTS_FILE)
        write_config(folder, self.config)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> ViT:
        """The model saved by `save_pretrained`, on the CPU and in evaluation mode (`.train()` before training it).

        Args:
            source: the folder, or a repository of the Hugging Face Hub, "ORG/NAME".
            revision, token, cache_dir, force_download, local_files_only: as in huggingface_hub.hf_hub_download.
            overrides: fields of the configuration to replace. Another `num_classes` asks for a new head, of zeros;
                another `image_size` interpolates the positions.

        Returns:
            An `FFVT`, a `TransFG` or a `ViT`, as the configuration says, whichever of them is asked.

        Raises:
            FileNotFoundError: no config.json or model.safetensors there, or no such repository.
            ConnectionError: the Hub cannot be reached, and its cache lacks the repository.
            ValueError: one of the two files is damaged, or the weights are not those of a model of this configuration,
                the head included. Sizes are compared before anything of that size is made.
        """
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
        hub |= {"force_download": force_download, "local_files_only": local_files_only}
        folder = locate("from_pretrained", source, **hub)
        config = read_config("from_pretrained", folder)
        weights = existing_file("from_pretrained", folder)
        kind = cls if config.kind == cls.kind else _kind(config)
        with torch.device("meta"):
            check_header("from_pretrained", weights, kind(config).state_dict())
        config = replace_fields("from_pretrained", config, overrides)
        model = cls(config) if config.kind == cls.kind else from_config(config)
        report = load_own_weights(model, weights)
        new = [name for name in report.left if not (name.startswith("head.") and "num_classes" in overrides)]
        if new:
            shown = f"{', '.join(new[:3])} with overrides {printable(', '.join(overrides)) or 'none'}"
            raise ValueError(f"from_pretrained: no weight but a new head's must be left out; got {shown}")
        if report.cast:
            log.info("from_pretrained: %s cast from %s", weights, ", ".join(report.cast))
        return model.eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload a model",
        license: str = "mit",
    ) -> str:
        """Uploads the model to the Hugging Face Hub, for `FFVT.from_pretrained(repo_id)`.

        The repository gets config.json, model.safetensors and, where it has no README.md, a model card.

        Args:
            repo_id: "ORG/NAME"; the repository is made if it is missing.
            private: whether a new repository is private; None for the organisation's default.
            token: of the Hub; None for that of `hf auth login`.
            branch: branch to commit to; None for main.
            create_pr: whether to propose the commit instead.
            commit_message: message of the commit.
            license: licence that the model card names.

        Returns:
            The address of the commit.

        Raises:
            ImportError: no huggingface_hub.
        """
        options = {"private": private, "token": token, "branch": branch, "create_pr": create_pr}
        return push(self, repo_id, **options, commit_message=commit_message, license=license)


class FFVT(SelectingModel, ViT):
    """A ViT whose first L-1 blocks each pick K tokens; one last block fuses the class token with all of them.

    `forward` takes images (B, 3, S, S) and returns logits (B, num_classes); `forward_with_selection` returns what every
    block picked too. There is no loss inside.

    Raises:
        ValueError: the configuration is of another kind, a `ViT` or a `TransFG`.

    Source: Wang, Yu, Gao, "Feature Fusion Vision Transformer for Fine-Grained Visual Categorization", BMVC 2021
    (arXiv 2107.02341), sections 3.1-3.2; sizes from Dosovitskiy et al., ICLR 2021.
    """

    kind: ClassVar[str] = "ffvt"
    num_prefix_tokens: ClassVar[int] = 1

    @property
    def num_selecting(self) -> int:
        return len(self.blocks)

    @property
    def first_candidate(self) -> int:
        return self.config.first_candidate

    @property
    def transformer_blocks(self) -> list[nn.Module]:
        return [*self.blocks, self.last_block]

    def _make_blocks(self, config: FFVTConfig) -> None:
        """Blocks that pick by the fused operator; observed ones where another criterion, or token reduction, reads
        more than that returns."""
        self.criterion = find(config.criterion)
        fused, pruned = self.criterion.is_fused, config.prune_dead_rows
        kinds = [
            SelectingBlock if fused and not config.reduces(number) else ObservedBlock
            for number in range(config.depth - 1)
        ]
        if fused and pruned:
            kinds[-1] = PrunedSelectingBlock
        self.blocks = nn.ModuleList(kind(config) for kind in kinds)
        self.last_block = (ClassBlock if pruned else Block)(config)

    def forward_features_with_selection(self, images: Tensor) -> tuple[Tensor, Selection]:
        x, config = self.embed(images), self.config  # (B, N, C)
        reduction = TokenReduction(config.keep_rate, config.num_tokens)
        picker = Picker(self.criterion, config.num_select, config.first_candidate, reduction, self.recomputes)
        for number, block in enumerate(self.blocks):
            if isinstance(block, ObservedBlock):
                x, layer = self.run(block, x)
                picker.judge(x, layer._replace(number=number))
                if config.reduces(number):
                    x = reduction.reduce(x, layer)
            else:
                x, *picks = self.run(block, x)
                picker.take(*picks)
        x = self.run(self.last_block, picker.fused(x))
        return self.norm(x[:, 0]), picker.selection()


def from_config(config: FFVTConfig) -> ViT:
    """The model that a configuration names, an `FFVT`, a `TransFG` or the plain `ViT`, with initial weights."""
    return _kind(config)(config)


def _kind(config: FFVTConfig) -> type[ViT]:
    if config.kind == "transfg":
        from ffvt.model.transfg import TransFG  # which extends the ViT of this module

        return TransFG
    return FFVT if config.kind == "ffvt" else ViT


def create_model(
    name: str,
    image_size: int = 448,
    num_classes: int = 200,
    num_select: int = 12,
    feature_fusion: bool = True,
    **overrides: Any,
) -> ViT:
    """A new `FFVT` with initial weights; with feature_fusion=False the plain `ViT` of the same size, with
    head="transfg" a `TransFG`.

    Args:
        name: vit_s16, vit_s14, vit_b16, vit_b32, vit_l16, vit_l32, vit_h14, r50_vit_b16, or the authors' name of one
            ("ViT-B_16"); or "timm:NAME" for a ViT of timm, without its pretrained weights.
        image_size: S, side of the square images, pixels.
        num_classes: classes of the head.
        num_select: K, tokens picked by each of the first L-1 blocks.
        feature_fusion: whether to select and fuse tokens.
        overrides: any other field of `FFVTConfig`; for timm's, of `ffvt.model.timm_models.TimmConfig`. criterion can
            also be one of `ffvt.criteria` itself.

    Raises:
        ValueError: an unknown name or field, or a value that does not hold.
        ImportError: the hybrid, or timm's models, without timm.

    Source: FFVT (arXiv 2107.02341).
    """
    from ffvt.model.registry import config_of, model_of  # which knows this module

    sizes = {"image_size": image_size, "num_classes": num_classes, "num_select": num_select}
    if isinstance(overrides.get("criterion"), Criterion):
        overrides["criterion"] = overrides["criterion"].name
    return model_of(config_of(name, **sizes, feature_fusion=feature_fusion, **overrides))
