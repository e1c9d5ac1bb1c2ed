"""HAT: supernets of transformers for translation, whose subnets are slices (arXiv 2005.14187).

Elastic are the width of each side, the number of decoder layers, and per layer the heads, the channels inside the
feed-forward network and, in the decoder, how many of the encoder's last outputs it attends to. A subnet uses the first
channels of everything. `preset`s are the published spaces (`wmt`, `iwslt`) and a `small` one of our own that trains on
a laptop. Surprising: `attends` counts outputs (1 to 3), which published configs write as -1, 1 and 2. Units, whose
latencies add up to that of a subnet, process one sentence of `length` tokens with `beam` hypotheses: an encoder layer
once, a decoder layer token by token with its cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from slimray.arch import Arch, Dimension, Gene, Space, Stage
from slimray.models.supernets.elastic import ChannelGroup, Unit, take
from slimray.models.text.transformer import DecoderSize, Design, EncoderSize, Sizes, Transformer, require_heads
from slimray.models.text.units import Spoken, Translation, cross_unit, decoder_unit, encoder_unit, words_unit
from slimray.spec import lookup


@dataclass(frozen=True)
class Placed:
    """Name of the supernet's module for a unit (`source`)."""

    source: str


@dataclass(frozen=True)
class HatLayout:
    """A space of transformers: choices ascending, the same for all layers; `length` and `beam` define the units."""

    embeds: tuple[int, ...]
    ffns: tuple[int, ...]
    heads: tuple[int, ...]
    attends: tuple[int, ...]
    encoder_layers: int
    decoder_layers: int
    qkv: int
    tied: bool
    length: int
    beam: int = 5

    def space(self) -> Space:
        """Return the space of all subnets; `depth` skips layers of the decoder."""
        encoder, decoder = self.encoder_layers, self.decoder_layers
        return Space.of(
            {
                "encoder_embed": Dimension.number(self.embeds),
                "decoder_embed": Dimension.number(self.embeds),
                "encoder_ffn": Dimension.per_block([self.ffns] * encoder, None),
                "encoder_heads": Dimension.per_block([self.heads] * encoder, None),
                "depth": Dimension.depth([range(1, decoder + 1)], [Stage(decoder)]),
                "decoder_ffn": Dimension.per_block([self.ffns] * decoder),
                "decoder_heads": Dimension.per_block([self.heads] * decoder),
                "cross_heads": Dimension.per_block([self.heads] * decoder),
                "attends": Dimension.per_block([self.attends] * decoder),
            }
        )

    def plan(self, arch: Arch) -> list[Placed]:
        """Return the places of the units of `arch`, in order."""
        places = [f"encoder_layers.{i}" for i in range(self.encoder_layers)]
        for i in range(int(arch["depth"][0])):
            places += [f"decoder_layers.{i}", f"decoder_layers.{i}.encoder_attn"]
        return [Placed(place) for place in [*places, "embed"]]

    def cover(self) -> Iterator[Arch]:
        """Yield a few archs that together contain the units of all archs."""
        space = self.space()
        layers = list(product(self.heads, self.ffns))
        crosses = list(product(self.heads, self.attends))
        places = (self.encoder_layers, self.decoder_layers)
        count = max(-(-len(choices) // most) for choices in (layers, crosses) for most in places)
        for encoder, decoder in product(self.embeds, self.embeds):
            for number in range(count):
                rows = [[row[(number * most + i) % len(row)] for i in range(most)]
                        for row, most in ((layers, places[0]), (layers, places[1]), (crosses, places[1]))]  # fmt: skip
                (heads, ffns), (own, inside), (across, attends) = (tuple(zip(*row, strict=True)) for row in rows)
                yield space.arch(
                    {
                        "encoder_embed": encoder,
                        "decoder_embed": decoder,
                        "encoder_ffn": ffns,
                        "encoder_heads": heads,
                        "decoder_ffn": inside,
                        "decoder_heads": own,
                        "cross_heads": across,
                        "attends": attends,
                    }
                )


def sizes_of(arch: Arch) -> Sizes:
    """Return the sizes of the part of a supernet that runs for `arch`."""
    encoder = zip(arch["encoder_heads"], arch["encoder_ffn"], strict=True)
    names = ("decoder_heads", "cross_heads", "decoder_ffn", "attends")
    decoder = list(zip(*(arch[name] for name in names), strict=True))[: int(arch["depth"][0])]
    return Sizes(
        int(arch["encoder_embed"]),
        int(arch["decoder_embed"]),
        tuple(EncoderSize(int(heads), int(ffn)) for heads, ffn in encoder),
        tuple(DecoderSize(*map(int, one)) for one in decoder),
    )


class HatSupernet(Transformer):
    """The supernet: `net(tokens, arch)` runs a subnet, `net(tokens)` the largest, `net.extract(arch)` copies it."""

    def __init__(self, design: Design, layout: HatLayout):
        space = layout.space()
        super().__init__(design, sizes_of(space.largest()))
        self.layout, self.space = layout, space

    def forward(self, tokens: Tensor, arch: Arch | None = None) -> Tensor:  # type: ignore[override]
        """Compute logits `[B, L, V]` for pairs int `[B, 2, L]`; raise UserError for an arch of another space."""
        return super().forward(tokens, None if arch is None else sizes_of(self.space.arch(arch)))

    def extract(self, arch: Arch) -> Transformer:
        """Return the subnet `arch` as an ordinary transformer, in the mode of this one, with copies of its weights."""
        with torch.device("meta"):
            plain = Transformer(self.design, sizes_of(self.space.arch(arch)))
        take(plain, self)
        return plain.train(self.training)

    def latency_features(self, arch: Arch) -> list[float]:
        """Return the features from which a predictor learns the latency of `arch`: the published ten numbers."""
        return features(arch)

    def measured(self, arch: Arch, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
        """Return the module to time for the subnet `arch`, which translates a fixed sentence as its units do."""
        return Translation(self.extract(arch), self.spoken), shape

    @property
    def spoken(self) -> Spoken:
        """The sentence that units and measurements process."""
        return Spoken(self.layout.length, self.layout.beam)

    def units(self, arch: Arch) -> list[Unit]:
        """Return the pieces of the subnet `arch`: encoder layers, decoder layers and their attention to the source, and
        finally the embeddings and the output layer."""
        sizes, design = sizes_of(self.space.arch(arch)), self.design
        spoken = self.spoken
        out = [encoder_unit(design, sizes.encoder, one.heads, one.ffn, spoken) for one in sizes.encoder_layers]
        for one in sizes.decoder_layers:
            out.append(decoder_unit(design, sizes.decoder, one.heads, one.ffn, spoken))
            out.append(cross_unit(design, sizes.encoder, sizes.decoder, one.cross_heads, one.attends, spoken))
        return [*out, words_unit(design, sizes.encoder, sizes.decoder, spoken)]

    def channel_groups(self) -> list[ChannelGroup]:
        """Return no groups: as published, channels keep their order."""
        return []


def features(arch: Arch) -> list[float]:
    """Return the published ten features for predicting latency: widths, layers, and means over the layers that run."""
    sizes = sizes_of(arch)

    def mean(values: Sequence[Gene]) -> float:
        return sum(values) / len(values)

    encoder, decoder = sizes.encoder_layers, sizes.decoder_layers
    return [
        float(sizes.encoder),
        float(len(encoder)),
        mean([one.ffn for one in encoder]),
        mean([one.heads for one in encoder]),
        float(sizes.decoder),
        float(len(decoder)),
        mean([one.ffn for one in decoder]),
        mean([one.heads for one in decoder]),
        mean([one.cross_heads for one in decoder]),
        mean([one.attends for one in decoder]),
    ]


# ------------------------------------------------------------------------------------------------------------ models

WMT = HatLayout((512, 640), (1024, 2048, 3072), (4, 8), (1, 2, 3), 6, 6, 512, True, length=30)
PRESETS = {
    "wmt": WMT,
    "iwslt": replace(WMT, ffns=(512, 1024, 2048), heads=(2, 4), tied=False, length=23),
    "small": HatLayout((128, 192, 256), (256, 512, 1024), (2, 4), (1, 2, 3), 3, 3, 256, True, length=14),
    "tiny": HatLayout((16, 24), (16, 32), (2, 4), (1, 2), 2, 2, 16, True, length=6, beam=2),
}


def hat(
    *,
    vocab_size: int,
    preset: str = "small",
    pre_norm: bool = False,
    dropout: float = 0.1,
    attention_dropout: float = 0.0,
    released_dropout: bool = False,
    length: int = 0,
    beam: int = 0,
) -> HatSupernet:
    """Build a supernet of the space `preset` (PRESETS); raise UserError for an unknown one.

    `length` and `beam` (0: the preset's) are those of the sentence for measuring latency.
    """
    layout = lookup(PRESETS, preset, "preset")
    layout = replace(layout, length=length or layout.length, beam=beam or layout.beam)
    require_heads(layout.qkv, layout.heads, "heads")
    widest = max(layout.embeds)
    design = Design(vocab_size, layout.qkv, widest, layout.tied, pre_norm, dropout, attention_dropout, released_dropout)
    return HatSupernet(design, layout)
