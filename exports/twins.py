"""Models of train_baseline.py that transformers has, too: its class, its config, and the weights by its names."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

ACTIVATIONS = {"gelu": "gelu_new", "relu2": "relu2", "geglu": "gelu_pytorch_tanh", "swiglu": "silu"}  # names there


def gpt2(s, model: nn.Module, epsilon: float) -> tuple[str, dict, dict[str, Tensor]]:
    """GPT2LMHeadModel. Its projections have rows for inputs; q, k and v are one of them."""
    config = dict(
        model_type="gpt2", n_embd=s.width, n_layer=s.num_layers, n_head=s.width // s.head_dim, n_inner=s.mlp_hidden,
        n_positions=len(model.positions.weight), activation_function=ACTIVATIONS[s.mlp], layer_norm_epsilon=epsilon,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    weights = {"transformer.wte.weight": model.embed.weight, "transformer.wpe.weight": model.positions.weight}
    for name, part in [("ln_f", model.norm)]:
        weights |= {f"transformer.{name}.weight": part.weight, f"transformer.{name}.bias": part.bias}
    for i, block in enumerate(model.blocks):
        attn, mlp, place = block.attn, block.mlp, f"transformer.h.{i}"
        for name, part in (("ln_1", block.attn_norm), ("ln_2", block.mlp_norm)):
            weights |= {f"{place}.{name}.weight": part.weight, f"{place}.{name}.bias": part.bias}
        linear = {"attn.c_attn": (attn.q, attn.k, attn.v), "attn.c_proj": (attn.out,), "mlp.c_fc": (mlp.up,),
                  "mlp.c_proj": (mlp.down,)}
        for name, parts in linear.items():
            weights[f"{place}.{name}.weight"] = torch.cat([part.weight for part in parts]).T
            weights[f"{place}.{name}.bias"] = torch.cat([part.bias for part in parts])
    return "GPT2LMHeadModel", config, weights


def turned(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k for RoPE that turns the other way: the second half of each head's is negated."""
    sign = torch.ones(head_dim)
    sign[head_dim // 2:] = -1
    return (weight.unflatten(0, (-1, head_dim)) * sign[:, None]).flatten(0, 1)


def llama(s, model: nn.Module, epsilon: float) -> tuple[str, dict, dict[str, Tensor]]:
    """LlamaForCausalLM, or Qwen3ForCausalLM, which is that with normed queries and keys."""
    positions = model.window
    config = dict(
        model_type="qwen3" if s.qk_norm else "llama", hidden_size=s.width, intermediate_size=s.mlp_hidden,
        num_hidden_layers=s.num_layers, num_attention_heads=s.width // s.head_dim, num_key_value_heads=s.num_kv_heads,
        head_dim=s.head_dim, hidden_act=ACTIVATIONS[s.mlp], rms_norm_eps=epsilon, max_position_embeddings=positions,
        rope_theta=s.rope_base, rope_parameters={"rope_type": "default", "rope_theta": s.rope_base},
        attention_bias=False)
    gain, ones = (lambda norm: torch.ones(s.width) if norm.weight is None else norm.weight), torch.ones(s.head_dim)
    weights = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": gain(model.norm)}
    for i, block in enumerate(model.blocks):
        attn, mlp, place = block.attn, block.mlp, f"model.layers.{i}"
        own = {"self_attn.q_proj": turned(attn.q.weight, s.head_dim), "self_attn.v_proj": attn.v.weight,
               "self_attn.k_proj": turned(attn.k.weight, s.head_dim), "self_attn.o_proj": attn.out.weight,
               "mlp.up_proj": mlp.up.weight, "mlp.gate_proj": mlp.gate.weight, "mlp.down_proj": mlp.down.weight,
               "input_layernorm": gain(block.attn_norm), "post_attention_layernorm": gain(block.mlp_norm)}
        if s.qk_norm:  # without gains here; half negated ones normalize alike
            own |= {"self_attn.q_norm": ones, "self_attn.k_norm": ones}
        weights |= {f"{place}.{name}.weight": weight for name, weight in own.items()}
    return "Qwen3ForCausalLM" if s.qk_norm else "LlamaForCausalLM", config, weights


def twin(s, model: nn.Module, epsilon: float) -> tuple[str, dict, dict[str, Tensor]] | None:
    """Class, config and weights of the same model in transformers; None if it has none.

    s: settings of train_baseline.py; a window shorter than the longest document is in no such class."""
    kind, kinds = getattr(s, "model_type", None), {"gpt": gpt2, "moderngpt": llama}
    gated = kind in kinds and "glu" in s.mlp
    if kind not in kinds or gated != (kind == "moderngpt"):
        return None
    longest = len(model.positions.weight) if kind == "gpt" else math.inf
    if s.window and s.window < longest:
        return None
    name, config, weights = kinds[kind](s, model, epsilon)
    tied = s.tied == "on"
    if not tied:
        weights["lm_head.weight"] = model.lm_head.weight
    config |= dict(architectures=[name], tie_word_embeddings=tied, vocab_size=len(model.embed.weight))
    return name, config, weights
