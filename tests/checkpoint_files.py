"""What the tests of shards share: a network, its checkpoint in files, and the content of a folder."""

import json

import torch
from safetensors.torch import save_file
from torch import nn

from gmcompress.shards.source import INDEX


class Net(nn.Module):
    """An embedding, linear layers, a convolution, a norm, a head, and a count."""

    def __init__(self, *, tied=False):
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.conv = nn.Conv2d(8, 16, 3)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32, bias=False)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 16, bias=False)
        self.register_buffer("seen", torch.tensor(7))
        self.register_buffer("scale", torch.ones(1), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(self.down(self.up(self.embed(tokens)).relu()))) * self.scale


def net(*, tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    return Net(tied=tied).to(dtype)


def stored(model, folder, *, files=2, index=True):
    """The model's tensors in several files, tied ones once, as Hugging Face stores them."""
    names, kept = {}, {id(each): name for name, each in model.state_dict(keep_vars=True).items()}
    state = {name: each.detach() for name, each in model.state_dict(keep_vars=True).items() if kept[id(each)] == name}
    folder.mkdir(parents=True)
    for at in range(files):
        part = dict(list(state.items())[at::files])
        save_file(part, folder / f"model-{at + 1}.safetensors")
        names |= dict.fromkeys(part, f"model-{at + 1}.safetensors")
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
