"""Models of train_baseline.py that transformers has, too: its class, its config, and the weights by its names."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

ACTIVATIONS = {  # their names there
    "gelu": "gelu_new", "relu2": "relu2", "geglu": "gelu_pytorch_tanh", "swiglu": "silu"}
Twin = tuple[str, dict, dict[str, Tensor]]  # class, config, weights


def both(name: str, part: nn.Module) -> dict[str, Tensor]:
    """Weight and bias of a layer, by name."""
    return {f"{name}.weight": part.weight, f"{name}.bias": part.bias}


def gpt2(s, model: nn.Module, epsilon: float) -> Twin:
    """GPT2LMHeadModel. Its projections have rows for inputs; q, k and v are one of them."""
    config = dict(
        model_type="gpt2", n_embd=s.width, n_layer=s.num_layers,
        n_head=s.width // s.head_dim, n_inner=s.mlp_hidden,
        n_positions=len(model.positions.weight),
        activation_function=ACTIVATIONS[s.mlp], layer_norm_epsilon=epsilon,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    weights = both("transformer.ln_f", model.norm)
    weights["transformer.wte.weight"] = model.embed.weight
    weights["transformer.wpe.weight"] = model.positions.weight
    for i, block in enumerate(model.blocks):
        attn, mlp, place = block.attn, block.mlp, f"transformer.h.{i}"
        weights |= both(f"{place}.ln_1", block.attn_norm)
        weights |= both(f"{place}.ln_2", block.mlp_norm)
        linear = {
            "attn.c_attn": (attn.q, attn.k, attn.v), "attn.c_proj": (attn.out,),
            "mlp.c_fc": (mlp.up,), "mlp.c_proj": (mlp.down,)}
        for name, parts in linear.items():
            weight = torch.cat([part.weight for part in parts])
            weights[f"{place}.{name}.weight"] = weight.T
            weights[f"{place}.{name}.bias"] = torch.cat([part.bias for part in parts])
    return "GPT2LMHeadModel", config, weights


def turned(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k for RoPE that turns the other way: the second half of each head's is negated."""
    sign = torch.ones(head_dim)
    sign[head_dim // 2:] = -1
    heads = weight.unflatten(0, (-1, head_dim))
    return (heads * sign[:, None]).flatten(0, 1)


def llama(s, model: nn.Module, epsilon: float) -> Twin:
    """LlamaForCausalLM, or Qwen3ForCausalLM, which is that with normed queries and keys."""
    config = dict(
        model_type="qwen3" if s.qk_norm else "llama", hidden_size=s.width,
        intermediate_size=s.mlp_hidden, num_hidden_layers=s.num_layers,
        num_attention_heads=s.width // s.head_dim,
        num_key_value_heads=s.num_kv_heads, head_dim=s.head_dim,
        hidden_act=ACTIVATIONS[s.mlp], rms_norm_eps=epsilon,
        max_position_embeddings=model.window, rope_theta=s.rope_base,
        rope_parameters={"rope_type": "default", "rope_theta": s.rope_base},
        attention_bias=False)

    def gain(norm: nn.Module) -> Tensor:
        return torch.ones(s.width) if norm.weight is None else norm.weight

    weights = {"model.embed_tokens.weight": model.embed.weight}
    weights["model.norm.weight"] = gain(model.norm)
    for i, block in enumerate(model.blocks):
        attn, mlp = block.attn, block.mlp
        own = {
            "self_attn.q_proj": turned(attn.q.weight, s.head_dim),
            "self_attn.k_proj": turned(attn.k.weight, s.head_dim),
            "self_attn.v_proj": attn.v.weight, "self_attn.o_proj": attn.out.weight,
            "mlp.up_proj": mlp.up.weight, "mlp.gate_proj": mlp.gate.weight,
            "mlp.down_proj": mlp.down.weight,
            "input_layernorm": gain(block.attn_norm),
            "post_attention_layernorm": gain(block.mlp_norm)}
        if s.qk_norm:  # without gains here; half negated ones normalize alike
            ones = torch.ones(s.head_dim)
            own |= {"self_attn.q_norm": ones, "self_attn.k_norm": ones}
        weights |= {f"model.layers.{i}.{name}.weight": x for name, x in own.items()}
    name = "Qwen3ForCausalLM" if s.qk_norm else "LlamaForCausalLM"
    return name, config, weights


def twin(s, model: nn.Module, epsilon: float) -> Twin | None:
    """Class, config and weights of the same model in transformers; None if it has none.

    s: settings of train_baseline.py; a window shorter than the longest document is in no such class."""
    kind = getattr(s, "model_type", None)
    make = {"gpt": gpt2, "moderngpt": llama}.get(kind)
    if make is None or ("glu" in s.mlp) != (kind == "moderngpt"):
        return None
    longest = len(model.positions.weight) if kind == "gpt" else math.inf
    if s.window and s.window < longest:
        return None
    name, config, weights = make(s, model, epsilon)
    tied = s.tied == "on"
    if not tied:
        weights["lm_head.weight"] = model.lm_head.weight
    config |= dict(architectures=[name], tie_word_embeddings=tied)
    config["vocab_size"] = len(model.embed.weight)
    return name, config, weights
