"""The field's systems by name, and what asks for each of them here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """A published way to choose or replace blocks.

    Attributes:
        name: The system, or the criterion.
        source: Who published it.
        idea: What it does, in a few words.
        ask: What asks for it: names of criteria, of replacements, or of protections.
        note: Where published code or this project differs.
    """

    name: str
    source: str
    idea: str
    ask: tuple[str, ...]
    note: str = ""


SYSTEMS = (
    System("reverse order", "Lu et al. 2024", "the deepest go first", ("reverse",)),
    System("random", "control", "a draw a seed", ("random",), "several: `preln.prune.random_orders`"),
    System(
        "magnitude l1, l2",
        "Han et al. 2015; Li et al. 2016",
        "norms of the block's matrices, added up",
        ("magnitude_l1", "magnitude_l2"),
        "published code adds squares: `magnitude_l2_squared`",
    ),
    System(
        "Taylor",
        "Molchanov et al. 2019",
        "sum over the weights of |g w|, g of all tokens together",
        ("taylor",),
        "absolute values sequence by sequence: `taylor_by_sequence`",
    ),
    System("perplexity", "Kim et al. 2024", "loss without the block", ("perplexity",)),
    System(
        "ShortGPT (BI)",
        "Men et al. 2024",
        "1 - mean cosine of what enters and leaves",
        ("block_influence",),
        "one cosine over the batch: `block_influence_global`; the official code's end: "
        "`block_influence_shortgpt`",
    ),
    System(
        "UIDL, PruneMe",
        "Gromov et al. 2024",
        "the window across which the last token turns least",
        ("angular",),
        "over all tokens: `angular_all_tokens`; last block kept: `--protect uidl`",
    ),
    System(
        "sum of adjacent angles",
        "a retelling of the above",
        "the window of least summed turns",
        ("angular_sum",),
        "refuted as equal to it: `SIM-SUM`",
    ),
    System(
        "SLEB", "Song et al. 2024", "greedy by loss, scored again each time", ("sleb",), "`--protect sleb`"
    ),
    System(
        "FinerCut",
        "Zhang et al. 2024",
        "greedy over attention and MLP halves by the output's change",
        ("finercut", "finercut_euclidean", "finercut_angular"),
        "published code turns the divergence round; `--protect finercut`",
    ),
    System(
        "LLM-Drop",
        "He et al. 2024",
        "attention or MLP halves that turn the stream least",
        ("llm_drop_attention", "llm_drop_mlp"),
        "iterative: `llm_drop_attention@1`",
    ),
    System(
        "shortened-llm",
        "Kim et al. 2024",
        "Taylor+ and Mag+: ends of the model protected",
        ("shortened-plus",),
        "a protection, for any criterion",
    ),
    System(
        "iterative 1:1:n",
        "Lu et al. 2024",
        "remove one, score again",
        ("block_influence@1",),
        "`@k` after any one-shot criterion",
    ),
    System(
        "residual Taylor",
        "this project (PRN-FIRST-ORDER)",
        "first-order rise of the loss without the block's update",
        ("first_order_damage",),
    ),
    System(
        "attenuated contribution",
        "this project (PRN-BOUND)",
        "the update's norm times measured norms of what follows",
        ("attenuated_contribution",),
    ),
    System(
        "LaCo", "Yang et al. 2024", "layers collapse into the one in front", ("laco",), "with the paper's sum"
    ),
    System(
        "sliding-window merging",
        "Ding et al. 2025",
        "windows of like blocks merge into one",
        ("sliding_merge",),
        "released code keeps one layer's weights",
    ),
    System(
        "MKA",
        "Liu et al. 2024",
        "neighbours alike on a diffusion map are averaged",
        ("mka",),
        "released code merges nothing",
    ),
    System(
        "GRASP",
        "Liu et al. 2025",
        "redundant blocks keep the singular directions that the loss feels",
        ("grasp",),
        "labels shifted once",
    ),
    System(
        "LLM-Streamline", "Chen et al. 2024", "one light block trained to stand for many", ("streamline",)
    ),
    System("ELDeR", "Feng et al. 2025", "every block's update gets a learned weight", ("elder",)),
)
