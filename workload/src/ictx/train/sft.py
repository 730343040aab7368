"""Supervised fine-tuning: trains a model on the answers of conversations."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ictx.data.chat.config import ChatDataConfig
from ictx.data.chat.files import read_meta, read_rows
from ictx.data.chat.packing import ChatBatches, Windows
from ictx.data.chat.tokens import Conversations, encoded, write
from ictx.data.loader import Batch
from ictx.data.shards import SPLITS
from ictx.data.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, require_fit
from ictx.errors import UserError
from ictx.folder import replacing
from ictx.infer.vocabulary import Vocabulary
from ictx.model import Transformer
from ictx.model.hf_tokenizer import OTHER_FILES
from ictx.train.child import Child
from ictx.train.config import StageConfig
from ictx.train.loss import Counts, Loss, next_token_loss, token_counts
from ictx.train.prepared import checked_folder
from ictx.train.ranks import Ranks, on_first
from ictx.train.validation import Validation

ENCODED, COUNTS = "conversations", "counts.json"
"""Names in a run's folder: tokenized conversations, and the numbers of skipped ones."""
TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class SftConfig(StageConfig):
    """Settings of supervised fine-tuning. `train.sequence_length` is the maximum of tokens per conversation: longer
    ones are skipped and reported."""

    data: ChatDataConfig = field(default_factory=lambda: ChatDataConfig("sft"))
    """Conversations."""
    packing: bool = True
    """Pack several conversations into a window, without attention between them; else one conversation per window."""
    chat_template: Path | None = None
    """File with the chat template, also used by the exported model; default: the parent's template."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.kind != "sft":
            raise ValueError(f"data.kind is {self.data.kind}: expected sft")


class Tuning(Child):
    """The stage `sft`: next-token prediction on answers, with attention within conversations."""

    config: SftConfig

    name, settings = "sft", SftConfig

    @property
    def data_dir(self) -> Path:
        """Folder of the conversations."""
        if self.config.data.dir is None:
            raise UserError("data.dir is not set: add --set data.dir=FOLDER, the path that `ictx data prepare` printed")
        return self.config.data.dir

    def batches(self, ranks: Ranks) -> ChatBatches:
        """Returns the conversations in windows. Raises UserError if they do not match parent and settings."""
        loop = self.config.train
        folder = checked_folder(self.data_dir, self.config.data)
        self.fingerprint: str = on_first(lambda: read_meta(folder, "sft"))["fingerprint"]
        tokens, self.vocabulary = on_first(lambda: self._encoded(folder))
        train, held_out = (
            Windows(Conversations.open(tokens / f"{split}.bin"), loop.sequence_length, loop.seed, self.config.packing)
            for split in SPLITS
        )
        self.validation = Validation(len(held_out), held_out.batch, loop, ranks)
        return ChatBatches(train, loop.batch_size, ranks.data_rank, ranks.data_count, ranks.part)

    def counts(self, model: Transformer, batch: Batch) -> Counts:
        """Returns the denominators of a batch's losses; `tokens` are those of answers."""
        return token_counts(model, batch)

    def loss(self, model: Transformer, batch: Batch, totals: Counts) -> Loss:
        """Returns the cross-entropy of the answers' tokens."""
        return next_token_loss(model, batch, True, totals)

    def examine(self, model: Transformer) -> dict[str, float]:
        """Returns the loss on held-out conversations, and the largest activations."""
        return self.validation.examine(model, self)

    def conclude(self, result: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Returns no further fields, and a log line with the loss on held-out answers."""
        # Runs started by earlier versions lack val_loss_before.
        before = f" ({result['val_loss_before']:.3f} before)" if "val_loss_before" in result else ""
        return {}, f"validation loss {result['val_loss']:.3f} nats per token of held-out answers{before}"

    def _encoded(self, folder: Path) -> tuple[Path, Path]:
        """Returns the folder with the tokenized conversations, created if missing, and the vocabulary's."""
        loop, own, run = self.config.train, self.config.chat_template, self.config.run.dir
        assert run
        directory = self._with_template(own, run) if own else self.vocabulary
        vocabulary = Vocabulary.load(directory)
        require_fit(vocabulary.tokenizer, self.config.model.vocab_size, f"the tokenizer of {self.parent.init}")
        template = vocabulary.template()
        used = [self.fingerprint, vocabulary.tokenizer.to_str(), vocabulary.chat_template, loop.sequence_length]
        key = hashlib.sha256(json.dumps(used).encode()).hexdigest()[:16]
        tokens = run / ENCODED / key
        if not tokens.exists():
            with replacing(tokens) as draft:
                found = {}
                for split in SPLITS:
                    rows = encoded(read_rows(folder, split), vocabulary.tokenizer, template)
                    found[split] = write(draft / f"{split}.bin", rows, loop.sequence_length)
                (draft / COUNTS).write_text(json.dumps(found))
        for split, counts in json.loads((tokens / COUNTS).read_text()).items():
            _report(f"{split} conversation", folder, counts, loop.sequence_length)
        return tokens, directory

    def _with_template(self, file: Path, run: Path) -> Path:
        """Returns a folder with the parent's tokenizer and another chat template. Raises UserError."""
        with replacing(run / "vocabulary") as draft:
            for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, *OTHER_FILES):
                if (self.parent.directory / name).exists():
                    shutil.copyfile(self.parent.directory / name, draft / name)
            shutil.copyfile(file, draft / TEMPLATE_FILE)
        return run / "vocabulary"


def _report(what: str, folder: Path, counts: tuple[int, int, int], length: int) -> None:
    """Prints the number of skipped conversations. Raises UserError if all were skipped.

    Args: `counts` are the numbers of kept and skipped conversations, and the tokens of the longest.
    """
    kept, dropped, longest = counts
    if not kept:
        raise UserError(
            f"no {what} of {folder} has at most {length} tokens (train.sequence_length): the longest has {longest}"
        )
    if dropped:
        print(
            f"skipped {dropped:,} of {kept + dropped:,} {what}s (longer than train.sequence_length, {length}): the "
            f"longest has {longest:,} tokens",
            flush=True,
        )
