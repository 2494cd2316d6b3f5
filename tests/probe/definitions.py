"""Every measure once more, slowly, from its definition: float64 loops, other hooks, the library's loss."""

from __future__ import annotations

import math

import numpy as np
import torch

# by architecture: where blocks, norms, branches and the final norm are (written by hand, not found)
NAMES = {
    "llama": (
        "model.layers",
        "input_layernorm",
        "self_attn",
        "post_attention_layernorm",
        "mlp",
        "model.norm",
    ),
    "qwen3": (
        "model.layers",
        "input_layernorm",
        "self_attn",
        "post_attention_layernorm",
        "mlp",
        "model.norm",
    ),
    "gpt2": ("transformer.h", "ln_1", "attn", "ln_2", "mlp", "transformer.ln_f"),
}


# by architecture: the groups of a block's parameters and where they are, by hand
_LLAMA = {
    "q": ["self_attn.q_proj"],
    "k": ["self_attn.k_proj"],
    "v": ["self_attn.v_proj"],
    "o": ["self_attn.o_proj"],
    "gate": ["mlp.gate_proj"],
    "up": ["mlp.up_proj"],
    "down": ["mlp.down_proj"],
    "norms": ["input_layernorm", "post_attention_layernorm"],
    "attention": ["self_attn"],
    "mlp": ["mlp"],
    "block": [""],
}
GROUPS = {
    "LlamaDecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA | {"norms": [*_LLAMA["norms"], "self_attn.q_norm", "self_attn.k_norm"]},
    "GPT2Block": {
        "qkv": ["attn.c_attn"],
        "o": ["attn.c_proj"],
        "up": ["mlp.c_fc"],
        "down": ["mlp.c_proj"],
        "norms": ["ln_1", "ln_2"],
        "attention": ["attn"],
        "mlp": ["mlp"],
        "block": [""],
    },
}


def parameter_norms(model, blocks, final):
    """(layer, site) -> (|gradient|, |parameters|), both over all entries; the head's embedding part left out.

    The library's tied table gets the embedding's gradient too, so the head's is taken by its own formula
    from the logits: dL/dW = (dL/dlogits)' h.
    """
    table = {}
    for layer, block in enumerate(blocks):
        for site, places in GROUPS[type(block).__name__].items():
            members = [p for place in places for p in block.get_submodule(place).parameters()]
            table[layer, site] = (
                math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in members)),
                math.sqrt(sum(p.detach().double().pow(2).sum().item() for p in members)),
            )
    own = list(final.parameters())
    table[len(blocks), "final_norm"] = tuple(
        math.sqrt(sum(v.double().pow(2).sum().item() for v in values))
        for values in ([p.grad for p in own], [p.detach() for p in own])
    )
    return table


def head_gradient(run):
    """dL/dW of the head from the definition: softmax minus one-hot, over the number of targets."""
    with torch.no_grad():
        h = run.final(run.x[-1].detach())
        logits = run.model.get_output_embeddings()(h)[:, :-1].double()
        error = torch.softmax(logits, -1)
        error.scatter_add_(-1, run.ids[:, 1:, None], -torch.ones_like(logits[..., :1]))
        error /= run.ids[:, 1:].numel()
        return torch.einsum("ntv,ntd->vd", error, h[:, :-1].double())


class Run:
    """All tensors of one run over all sequences at once, with gradients of the mean token loss."""

    def __init__(self, model, ids, architecture):
        blocks_path, norm1, attention, norm2, mlp, final = NAMES[architecture]
        blocks = list(model.get_submodule(blocks_path))
        kept: dict = {}
        handles = []

        def keep(name, tensor):
            tensor.retain_grad()
            kept[name] = tensor

        for i, block in enumerate(blocks):
            for name, module in (("norm1", norm1), ("norm2", norm2)):
                handles.append(
                    block.get_submodule(module).register_forward_pre_hook(
                        lambda m, a, key=(name, i): keep(key, a[0])
                    )
                )
            for name, module in (("attention", attention), ("mlp", mlp)):
                handles.append(
                    block.get_submodule(module).register_forward_hook(
                        lambda m, a, o, key=(name, i): keep(key, o[0] if isinstance(o, tuple) else o)
                    )
                )
        handles.append(model.get_submodule(final).register_forward_pre_hook(lambda m, a: keep("last", a[0])))
        model.zero_grad()
        with torch.enable_grad():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        for handle in handles:
            handle.remove()
        self.loss, self.blocks, self.num_blocks = loss.item(), blocks, len(blocks)
        # in a sequential Pre-LN block the first norm reads x[l] itself
        self.x = [kept["norm1", i] for i in range(len(blocks))] + [kept["last"]]
        self.middle = [kept["norm2", i] for i in range(len(blocks))]
        self.f1 = [kept["attention", i] for i in range(len(blocks))]
        self.f2 = [kept["mlp", i] for i in range(len(blocks))]
        self.norms = {(i, "attention"): block.get_submodule(norm1) for i, block in enumerate(blocks)}
        self.norms |= {(i, "mlp"): block.get_submodule(norm2) for i, block in enumerate(blocks)}
        self.norms[len(blocks), "final_norm"] = model.get_submodule(final)
        self.final = model.get_submodule(final)
        self.param = parameter_norms(model, blocks, self.final)
        self.ids, self.model = ids, model
        model.zero_grad()

    def norm_input(self, layer, site):
        return self.middle[layer] if site == "mlp" else self.x[layer]


def tokens_of(tensor, first):
    """Token vectors as float64 rows, with or without each sequence's first."""
    value = tensor.detach().double().numpy()
    return value[:, (0 if first else 1) :].reshape(-1, value.shape[-1])


def cosine(a, b):
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def norm_jacobian_sigma(norm, vector, gain=True):
    """Largest singular value of the module's own Jacobian, by autograd and a dense decomposition."""
    jacobian = torch.autograd.functional.jacobian(norm, vector).double()
    if not gain:
        # undo the gain, read off how the module scales each channel
        raw = norm.weight.detach().double()
        gain_vector = 1 + raw if "Gemma" in type(norm).__name__ else raw
        jacobian = jacobian / gain_vector[:, None]
    return torch.linalg.svdvals(jacobian)[0].item()


def expected(run: Run) -> dict:
    """(measure, layer, site, statistic) -> value."""
    table: dict = {}
    for statistic, first in (("mean", True), ("mean_without_first_token", False)):

        def put(measure, layer, site, value, statistic=statistic):
            table[measure, layer, site, statistic] = float(value)

        def rows(tensor, first=first):
            return tokens_of(tensor, first)

        for layer, x in enumerate(run.x):
            put("residual_rms", layer, "block", np.mean([math.sqrt((v @ v) / len(v)) for v in rows(x)]))
            put("grad_hidden", layer, "block", math.sqrt((rows(x.grad) ** 2).sum()))
            for (measure, _), value in sequence_means(x, first, statistic).items():
                put(measure, layer, "block", value)
        for layer in range(run.num_blocks):
            x, y, middle = rows(run.x[layer]), rows(run.x[layer + 1]), rows(run.middle[layer])
            halves = {
                "block": (x, rows(run.f1[layer]) + rows(run.f2[layer]), rows(run.x[layer + 1].grad)),
                "attention": (x, rows(run.f1[layer]), rows(run.middle[layer].grad)),
                "mlp": (middle, rows(run.f2[layer]), rows(run.x[layer + 1].grad)),
            }
            for site, (start, f, g) in halves.items():
                ratio = [np.linalg.norm(b) / np.linalg.norm(a) for a, b in zip(start, f, strict=True)]
                put("update_ratio", layer, site, np.mean(ratio))
                put("cosine", layer, site, np.mean([cosine(a, a + b) for a, b in zip(start, f, strict=True)]))
                put("first_order_damage", layer, site, -sum(a @ b for a, b in zip(g, f, strict=True)))
                put(
                    "update_cosine",
                    layer,
                    site,
                    np.mean([cosine(a, b) for a, b in zip(start, f, strict=True)]),
                )
            growth = [np.linalg.norm(b) / np.linalg.norm(a) for a, b in zip(x, y, strict=True)]
            put("residual_growth", layer, "block", np.mean(growth))
            put(
                "block_influence",
                layer,
                "block",
                1 - np.mean([cosine(a, b) for a, b in zip(x, y, strict=True)]),
            )
            put("block_influence_global", layer, "block", 1 - cosine(x.ravel(), y.ravel()))
        for (layer, site), norm in run.norms.items():
            h = run.norm_input(layer, site).detach()[:, (0 if first else 1) :].reshape(-1, run.x[0].shape[-1])
            put("norm_sigma", layer, site, np.mean([norm_jacobian_sigma(norm, v) for v in h]))
            put("norm_sigma_no_gain", layer, site, np.mean([norm_jacobian_sigma(norm, v, False) for v in h]))
            put("variance_le_one", layer, site, np.mean([np.var(v.numpy()) <= 1 for v in h]))
            numbers = h.double().numpy()
            put("norm_input_rms", layer, site, np.mean(np.sqrt((numbers**2).mean(axis=1))))
            put("norm_input_mean", layer, site, np.mean(numbers))
            put("norm_input_variance", layer, site, np.mean(numbers.var(axis=1)))
    head = run.model.get_output_embeddings().weight.detach().double().norm().item()
    norms = run.param | {(run.num_blocks, "head"): (head_gradient(run).norm().item(), head)}
    for (layer, site), (gradient, weight) in norms.items():
        table["grad_param", layer, site, "mean"] = gradient
        table["grad_param_relative", layer, site, "mean"] = gradient / weight
    squares = [norms[layer, "block"][0] ** 2 for layer in range(run.num_blocks)]
    squares.append(sum(norms[run.num_blocks, site][0] ** 2 for site in ("final_norm", "head")))
    for layer in range(run.num_blocks + 1):
        table["grad_tail_share", layer, "block", "mean"] = sum(squares[layer:]) / sum(squares)
    return table


def sequence_means(states, first, statistic):
    """(measure, statistic) -> mean over sequences, for what is one number a sequence."""
    shares = {"massive_token_share": [], "massive_channel_share": [], "effective_rank": []}
    for matrix in states.detach().double().numpy()[:, (0 if first else 1) :]:
        square = matrix**2
        shares["massive_token_share"].append(square.sum(axis=1).max() / square.sum())
        shares["massive_channel_share"].append(square.sum(axis=0).max() / square.sum())
        values = np.linalg.svd(matrix, compute_uv=False)
        p = values[values > 0] / values.sum()
        shares["effective_rank"].append(math.exp(-(p * np.log(p)).sum()))
    return {(name, statistic): float(np.mean(values)) for name, values in shares.items()}


def expected_lens(run: Run) -> dict:
    """(measure, layer, statistic) -> value, by really removing blocks l and later."""
    table, model = {}, run.model
    gpt2 = type(run.blocks[0]).__name__ == "GPT2Block"
    holder, name = (model.transformer, "h") if gpt2 else (model.model, "layers")
    final = None
    for layer in range(run.num_blocks, -1, -1):
        with torch.no_grad():
            if layer:
                setattr(holder, name, torch.nn.ModuleList(run.blocks[:layer]))
                former = model.config.num_hidden_layers
                model.config.num_hidden_layers = layer
                logits = model(input_ids=run.ids, use_cache=False).logits
                model.config.num_hidden_layers = former
                setattr(holder, name, torch.nn.ModuleList(run.blocks))
            else:
                logits = model.get_output_embeddings()(run.final(run.x[0].detach()))
        final = logits.argmax(-1) if final is None else final
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].double().mT, run.ids[:, 1:], reduction="none"
        )
        same = (logits.argmax(-1) == final).double()
        for statistic, skip in (("mean", 0), ("mean_without_first_token", 1)):
            table["lens_loss", layer, "block", statistic] = losses[:, skip:].mean().item()
            table["lens_agreement", layer, "block", statistic] = same[:, skip:].mean().item()
    return table


def expected_pairs(run: Run) -> dict:
    """(start, size) -> mean angular distance over all tokens, and at the last token, by atan2 in float64."""
    table = {}
    for start in range(run.num_blocks + 1):
        for end in range(start + 1, run.num_blocks + 1):
            angles = np.zeros(run.x[0].shape[:2])
            for i, t in np.ndindex(*angles.shape):
                a, b = run.x[start][i, t].detach().double(), run.x[end][i, t].detach().double()
                a, b = a / a.norm(), b / b.norm()
                angles[i, t] = 2 * math.atan2((a - b).norm(), (a + b).norm()) / math.pi
            table[start, end - start] = (angles.mean(), angles[:, -1].mean())
    return table
