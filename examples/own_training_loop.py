"""MiniPLM's kernels in a training loop of one's own: the loss without logits, RMSNorm, packed attention.

    pip install -e .          # in this repository: torch, and Triton on Linux
    python examples/own_training_loop.py

A small transformer is trained twice, from equal weights on equal batches: with PyTorch's own operations, and
with `linear_cross_entropy`, `rms_norm` and `flash_attention` in their place. It prints both loss curves and
the memory that the logits need, which the second run makes in parts. Seconds on a CPU; on a GPU if there
is one.
"""

import re
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from miniplm.kernels import flash_attention, linear_cross_entropy, rms_norm
from torch import Tensor, nn

WIDTH, HEADS, LAYERS = 64, 4, 2
DOCUMENT, TOKENS, STEPS = 128, 512, 12  # tokens of a document at most and of a batch; steps of a run
LOGITS_BYTES = 2**20  # of logits at a time; the default is 256 MiB on a CPU, 1 GiB on a GPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class PyTorch:
    """PyTorch's own: a mask [T, T] keeps the documents of a batch apart, and the loss needs logits [T, V]."""

    @staticmethod
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps=1e-6)

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        place = torch.arange(len(q), device=q.device)
        document = torch.bucketize(place, cu_seqlens, right=True)
        mask = (document[:, None] == document) & (place[:, None] >= place)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, T, head width]
        return F.scaled_dot_product_attention(q, k, v, mask)[0].transpose(0, 1)

    @staticmethod
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.T, targets)


class MiniPLM:
    """The same on MiniPLM's kernels."""

    @staticmethod
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, eps=1e-6)

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return flash_attention(q, k, v, cu_seqlens, max_seqlen=DOCUMENT)

    @staticmethod
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, max_logits_bytes=LOGITS_BYTES)


class Block(nn.Module):
    def __init__(self, ops: type) -> None:
        super().__init__()
        self.ops = ops
        self.norm_1, self.norm_2 = (nn.Parameter(torch.ones(WIDTH)) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ops.norm(x, self.norm_1)).view(len(x), 3, HEADS, -1).unbind(1)
        x = x + self.out(self.ops.attention(q, k, v, cu_seqlens).flatten(1))
        return x + self.down(F.gelu(self.up(self.ops.norm(x, self.norm_2))))


class Model(nn.Module):
    def __init__(self, ops: type, vocabulary: int) -> None:
        super().__init__()
        self.ops = ops
        self.embedding, self.position = nn.Embedding(vocabulary, WIDTH), nn.Embedding(DOCUMENT, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)  # the head as well
        self.blocks = nn.ModuleList(Block(ops) for _ in range(LAYERS))
        self.norm = nn.Parameter(torch.ones(WIDTH))

    def forward(self, ids: Tensor, positions: Tensor, cu_seqlens: Tensor, targets: Tensor) -> Tensor:
        """The loss. ids, positions, targets [T]; cu_seqlens [documents + 1] int32: where each begins."""
        x = self.embedding(ids) + self.position(positions)
        for block in self.blocks:
            x = block(x, cu_seqlens)
        return self.ops.loss(self.ops.norm(x, self.norm), self.embedding.weight, targets)


def batches() -> tuple[list[tuple[Tensor, ...]], int]:
    """Packed batches of Python's language reference, and the size of the vocabulary, which is its words."""
    words = [re.findall(r"\w+|\W", text) for _, text in sorted(topics.items())]
    ids = {word: i for i, word in enumerate(sorted({word for text in words for word in text}))}
    documents = (text[i : i + DOCUMENT] for text in words for i in range(0, len(text), DOCUMENT))
    result = []
    for _ in range(STEPS):
        inputs, positions, targets, bounds = [], [], [], [0]
        while len(inputs) < TOKENS:
            document = [ids[word] for word in next(documents)]
            inputs += document
            positions += range(len(document))
            targets += [*document[1:], -100]  # the first word of another document is not predicted
            bounds.append(len(inputs))
        tensors = [torch.tensor(each, device=DEVICE) for each in (inputs, positions, bounds, targets)]
        tensors[2] = tensors[2].int()
        result.append(tuple(tensors))
    return result, len(ids)


def train(ops: type, data: list[tuple[Tensor, ...]], vocabulary: int) -> list[float]:
    torch.manual_seed(0)
    model = Model(ops, vocabulary).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for batch in data:
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    data, vocabulary = batches()
    plain, ours = train(PyTorch, data, vocabulary), train(MiniPLM, data, vocabulary)
    print("step   PyTorch   MiniPLM")
    for step, pair in enumerate(zip(plain, ours, strict=True), start=1):
        print(f"{step:>4}  {pair[0]:>8.4f}  {pair[1]:>8.4f}")
    print(f"largest difference {max(abs(a - b) for a, b in zip(plain, ours, strict=True)):.1e}")
    tokens = max(len(batch[0]) for batch in data)
    whole, part = tokens * vocabulary * 4 / 2**20, LOGITS_BYTES / 2**20
    print(f"logits of {tokens:,} tokens and {vocabulary:,} words: {whole:.1f} MiB, here {part:.1f} at a time")
    print(f"the same for 8,192 tokens and Qwen2's 151,936 ids: {8_192 * 151_936 * 4 / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
