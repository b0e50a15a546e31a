r"""Write a tiny language model whose every word is known beforehand: as a Hugging Face folder, and as a GGUF file.

Run it with the Python of an environment that has numpy, tokenizers, safetensors and gguf::

    python make_model.py FOLDER

FOLDER then holds `hf/` (for vLLM) and `tiny.gguf` (for llama.cpp): the same weights, tokenizer and chat template.

The network is a real Qwen2 (two layers, some 0.7 M parameters) whose attention and feed-forward parts are small noise.
What it says is written into the embedding and the output matrix: each word of the program below has a dimension of its
own, and the output row of the next word points along it. A word that is not in the program leads to `LOOP`; where a
grammar forbids that, to the JSON text. So, whatever the prompt:

- chat says ``Hello from a tiny model.`` and stops;
- chat with tools calls ``get_weather`` with ``{"city": "Paris"}``, and after the tool's result says Hello;
- a conversation whose last message has the word "count" in it counts for ever, as text completions do;
- under JSON mode, or a schema with one boolean called ok, it says ``{"ok":true}``.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

HIDDEN, LAYERS, HEADS, KV_HEADS, CONTEXT = 256, 2, 4, 2, 16384
HEAD = HIDDEN // HEADS
INNER = 2 * HIDDEN
EPSILON = 1e-6
THETA = 10000.0
NOISE = 0.004

END, PAD, CALL, COUNT = "<|im_end|>", "<|endoftext|>", "<|call|>", "<|count|>"
SPECIAL = (PAD, "<|im_start|>", END, CALL, COUNT)
JSON = '{"ok":true}'
TOOL = ("<tool_call>", '\n{"name": "get_weather", "arguments": ', '{"city": ', '"Paris"', "}}\n", "</tool_call>")
REPLY = ("Hello", " from", " a", " tiny", " model", ".")
LOOP = (" one", " two", " three", " four", " five", " six", " seven", " eight", " nine", " ten")

# What follows what. The first word of a line is what stands last in the prompt.
PROGRAM = (
    ("\n", *REPLY, END),
    (CALL, *TOOL, END),
    (COUNT, LOOP[0]),
    (*LOOP, LOOP[0]),
)

TEXT = (
    "Hello from a tiny model. It counts one two three four five six seven eight nine ten and knows little else. "
    "The system answers the user, the user asks the assistant, and the assistant calls a tool when it is told to. "
    "What is the weather in Paris? Please say hello, count to ten, or give me some JSON with an ok in it. "
)

# The markers at the end say which line of the program is to be spoken. Tools are listed as Hermes models have them.
TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}{%- for part in content -%}{{ part.text if part.text is defined else '' }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
<|im_start|>system
# Tools
You may call one function: <tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
Answer with <tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}
{% if message.role == 'tool' -%}<tool_response>
{% endif -%}
{{ text(message.content) }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}
{% if message.role == 'tool' %}
</tool_response>{% endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if messages and 'count' in text(messages[-1].content) -%}<|count|>
{%- elif tools and messages and messages[-1].role != 'tool' -%}<|call|>
{%- endif -%}
{%- endif -%}
"""


def train_tokenizer() -> Tokenizer:
    """A small byte-level BPE in which every word of the program is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in (*TOOL, JSON)])
    for word in {word for line in PROGRAM for word in line}:
        found = tokenizer.encode(word, add_special_tokens=False).ids
        if len(found) != 1:
            raise SystemExit(f"{word!r} is {len(found)} tokens, and must be one")
    return tokenizer


def make_weights(tokenizer: Tokenizer, vocabulary: int) -> dict[str, np.ndarray]:
    """The network, by the names of Hugging Face."""
    random = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * NOISE).astype(np.float32)

    embedding, output = program_matrices(tokenizer, vocabulary, random)
    ones, sizes = np.ones(HIDDEN, np.float32), {"q": HIDDEN, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD}
    found = {"model.embed_tokens.weight": embedding, "lm_head.weight": output, "model.norm.weight": ones}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        found |= {at + "input_layernorm.weight": ones.copy(), at + "post_attention_layernorm.weight": ones.copy()}
        for name, size in sizes.items():
            found[f"{at}self_attn.{name}_proj.weight"] = noise(size, HIDDEN)
            found[f"{at}self_attn.{name}_proj.bias"] = np.zeros(size, np.float32)
        found[at + "self_attn.o_proj.weight"] = noise(HIDDEN, HIDDEN)
        found |= {f"{at}mlp.{name}_proj.weight": noise(INNER, HIDDEN) for name in ("gate", "up")}
        found[at + "mlp.down_proj.weight"] = noise(HIDDEN, INNER)
    return found


def program_matrices(
    tokenizer: Tokenizer, vocabulary: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Embedding and output: dimension 0 is common to all tokens, a programmed one has a dimension of its own."""

    def token(word: str) -> int:
        return int(tokenizer.encode(word, add_special_tokens=False).ids[0])

    steps = {token(now): token(then) for line in PROGRAM for now, then in pairwise(line)}
    own = {now: 1 + place for place, now in enumerate(sorted(steps))}
    embedding = (random.standard_normal((vocabulary, HIDDEN)) * 0.05).astype(np.float32)
    embedding[:, : 1 + len(own)] = 0
    embedding[:, 0] = 1
    output = (random.standard_normal((vocabulary, HIDDEN)) * 0.001).astype(np.float32)
    for now, place in own.items():
        embedding[now, 1:] = 0
        embedding[now, place] = 1
        output[steps[now], place] = 5
    output[token(LOOP[0]), 0] = 2.5
    output[token(JSON), 0] = 1.5
    return embedding, output


def write_hugging_face(folder: Path, tokenizer: Tokenizer, weights: dict[str, np.ndarray], vocabulary: int) -> None:
    """The folder that vLLM and transformers load."""
    folder.mkdir(parents=True, exist_ok=True)
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": EPSILON,
        "rope_theta": THETA,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
        "torch_dtype": "float32",
    }
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, data in {
        "config.json": config,
        "tokenizer_config.json": described,
        "generation_config.json": {"eos_token_id": end, "pad_token_id": pad},
    }.items():
        (folder / name).write_text(json.dumps(data, indent=1))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    fixed = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
    stem, _, kind = name.rpartition(".")
    if stem in fixed:
        return f"{fixed[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def write_gguf(path: Path, tokenizer: Tokenizer, weights: dict[str, np.ndarray], vocabulary: int) -> None:
    """The file that llama.cpp loads."""
    saved = json.loads(tokenizer.to_str())
    added = {token["id"]: token for token in saved["added_tokens"]}
    words = {place: word for word, place in tokenizer.get_vocab(with_added_tokens=True).items()}
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(THETA)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([words.get(place, f"<|unused{place}|>") for place in range(vocabulary)])
    writer.add_token_types(
        [
            kinds[added[place]["special"]] if place in added
            else gguf.TokenType.NORMAL if place in words
            else gguf.TokenType.UNUSED
            for place in range(vocabulary)
        ]
    )  # fmt: skip
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["model"]["merges"]]
    )
    writer.add_bos_token_id(tokenizer.token_to_id(PAD))
    writer.add_eos_token_id(tokenizer.token_to_id(END))
    writer.add_pad_token_id(tokenizer.token_to_id(PAD))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in weights.items():
        writer.add_tensor(gguf_name(name), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Make both."""
    folder = Path(sys.argv[1])
    tokenizer = train_tokenizer()
    vocabulary = -(-tokenizer.get_vocab_size(with_added_tokens=True) // 64) * 64
    weights = make_weights(tokenizer, vocabulary)
    write_hugging_face(folder / "hf", tokenizer, weights, vocabulary)
    write_gguf(folder / "tiny.gguf", tokenizer, weights, vocabulary)
    sys.stdout.write(f"{folder}: {vocabulary} tokens, {sum(w.size for w in weights.values()) / 1e6:.1f} M parameters\n")


if __name__ == "__main__":
    main()
