"""Tiny models with random weights and the demo model's tokenizer, for quick tests of the engine.

They answer nonsense, the same nonsense every time, and load in a second: tiny-llama likes to say
one thing again and again, tiny-talker says words, others after every prompt. Owns no test and
starts no engine.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tools import demo_model

MODELS = demo_model.FOLDER.parent


def _make(
    path: Path,
    model_class: str,
    config_class: str,
    *,
    mend: Callable[[Any, Any], None] = lambda model, tokenizer: None,
    **config: Any,
) -> None:
    """Save a random model of the class in `path`, unless it is there."""

    def build(tokenizer: Any, transformers: Any) -> list[Any]:
        model = _random(model_class, config_class, tokenizer, config)
        mend(model, tokenizer)
        return [tokenizer, model]

    _save(path, build)


def _random(
    model_class: str, config_class: str, tokenizer: Any, config: dict[str, Any], seed: int = 0
) -> Any:
    import torch
    import transformers

    torch.manual_seed(seed)
    return getattr(transformers, model_class)(
        getattr(transformers, config_class)(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **{"tie_word_embeddings": True, **config},
        )
    ).to(torch.bfloat16)


def _save(path: Path, build: Callable[[Any, Any], list[Any]]) -> None:
    """Save the parts that `build` makes of tokenizer and library; whole or not at all."""
    if (path / "config.json").exists():
        return
    demo_model.make()
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model.FOLDER)
    with torch.no_grad():
        parts = build(tokenizer, transformers)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as temporary:
        work = Path(temporary) / "model"
        for part in parts:
            part.save_pretrained(work)
        (work / "model.safetensors").chmod(0o644)
        shutil.rmtree(path, ignore_errors=True)
        work.rename(path)


SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    # 32 is the smallest head that vLLM's attention on the CPU takes.
    "head_dim": 32,
    "max_position_embeddings": 2048,
}


def make_tiny_llama(path: Path) -> None:
    """Make a Llama of 2 layers and 3 million parameters, context 2,048, with a chat template."""
    _make(path, "LlamaForCausalLM", "LlamaConfig", **SHAPE)


def _let_talk(model: Any, tokenizer: Any) -> None:
    """Have the model say words where it may, and blanks only where it must.

    What would end an answer is no word either. The first dimension of the hidden state is made
    the same at every token, and its weight in the last layer is what a token is liked by.
    """
    model.model.embed_tokens.weight[:, 0] = 1
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        word = text.isascii() and text[:1] == " " and text[1:].isalpha()
        model.lm_head.weight[token, 0] = 0 if word else -1e4 if text.isspace() else -1e3


def make_tiny_talker(path: Path) -> None:
    """Make a Llama of 6 million parameters whose answers are words; for float32, see below."""
    # Weights as wide as these make it listen to every word of a prompt. In bfloat16 the likeliest
    # word would at times depend on what else the engine computes.
    _make(
        path,
        "LlamaForCausalLM",
        "LlamaConfig",
        mend=_let_talk,
        tie_word_embeddings=False,
        initializer_range=0.5,
        **SHAPE,
    )


BERT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    # As wide as this, the vectors of two texts differ.
    "initializer_range": 0.5,
}


def make_tiny_embed(path: Path) -> None:
    """Make a BERT of 2 layers whose embeddings have 64 dimensions, context 512."""
    _make(path, "BertModel", "BertConfig", **BERT)


def make_tiny_rerank(path: Path) -> None:
    """Make a BERT of 2 layers that scores a pair of texts: a cross-encoder, context 512."""
    _make(path, "BertForSequenceClassification", "BertConfig", num_labels=1, **BERT)


IMAGE_SIZE = 64
"""The side to which tiny-vision brings an image, in pixels: 16 patches that become 4 tokens."""


def make_tiny_vision(path: Path) -> None:
    """Make an Idefics3 (SmolVLM's kind): a vision tower and a Llama of 2 layers, context 2,048."""

    def build(tokenizer: Any, transformers: Any) -> list[Any]:
        marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
        # Weights as wide as these make it see what is in an image.
        wide = {"initializer_range": 0.5}
        vision = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": 16,
        }
        text = {"vocab_size": len(tokenizer), "tie_word_embeddings": True}
        model = _random(
            "Idefics3ForConditionalGeneration",
            "Idefics3Config",
            tokenizer,
            {
                "text_config": transformers.LlamaConfig(**text, **wide, **SHAPE).to_dict(),
                "vision_config": {**vision, **wide},
                "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
                "scale_factor": 2,
            },
        )
        images = transformers.Idefics3ImageProcessorPil(
            size={"longest_edge": IMAGE_SIZE},
            max_image_size={"longest_edge": IMAGE_SIZE},
            do_image_splitting=False,
        )
        processor = transformers.Idefics3Processor(
            images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
        )
        return [processor, model]

    _save(path, build)


SPEECH_S = 2
"""How much of a recording tiny-whisper hears at a time, in seconds."""


def make_tiny_whisper(path: Path) -> None:
    """Make a Whisper of 2 + 2 layers that hears 2 s at a time and answers up to 128 tokens."""

    def build(tokenizer: Any, transformers: Any) -> list[Any]:
        import torch

        end = "<|endoftext|>"
        marks = ["startoftranscript", "en", "de", "translate", "transcribe", "notimestamps"]
        marks += ["startoflm", "startofprev", "nospeech"]
        hearing = transformers.WhisperTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), end),
        )
        hearing.add_special_tokens({"additional_special_tokens": [f"<|{mark}|>" for mark in marks]})
        hearing.add_tokens([f"<|{n / 50:.2f}|>" for n in range(50 * SPEECH_S + 1)])
        ends = dict.fromkeys(
            ("bos_token_id", "eos_token_id", "pad_token_id"), hearing.convert_tokens_to_ids(end)
        )
        torch.manual_seed(0)
        model = transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(
                vocab_size=len(hearing),
                d_model=64,
                encoder_layers=2,
                decoder_layers=2,
                encoder_ffn_dim=128,
                decoder_ffn_dim=128,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                num_mel_bins=80,
                max_source_positions=50 * SPEECH_S,
                max_target_positions=128,
                decoder_start_token_id=hearing.convert_tokens_to_ids("<|startoftranscript|>"),
                init_std=0.5,  # as wide as this, it hears what is said
                **ends,
            )
        ).to(torch.bfloat16)
        features = transformers.WhisperFeatureExtractor(chunk_length=SPEECH_S)
        return [transformers.WhisperProcessor(features, hearing), model]

    _save(path, build)


KINDS: dict[str, Callable[[Path], None]] = {
    "tiny-llama": make_tiny_llama,
    "tiny-talker": make_tiny_talker,
    "tiny-embed": make_tiny_embed,
    "tiny-rerank": make_tiny_rerank,
    "tiny-vision": make_tiny_vision,
    "tiny-whisper": make_tiny_whisper,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make tiny models in a folder.")
    parser.add_argument("folder", nargs="?", type=Path, default=MODELS)
    folder = parser.parse_args().folder
    for name, make in KINDS.items():
        make(folder / name)
