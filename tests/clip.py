"""A tiny CLIP checkpoint with random weights."""

from pathlib import Path

import torch
from tokenizers import pre_tokenizers

TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
VISION = {
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_clip(folder: Path) -> Path:
    """A CLIP checkpoint whose shared space has 24 dimensions and whose photos are 32 pixels wide and high."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)).save_pretrained(folder)
    marks = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"{letter}</w>" for letter in LETTERS)]
    CLIPTokenizer(vocab={token: row for row, token in enumerate(vocabulary)}, merges=[]).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32, image_mean=[0.5, 0.4, 0.3]).save_pretrained(folder)
    return folder
