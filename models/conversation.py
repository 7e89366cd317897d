"""A clip and a question as a model's own chat template writes them: the frames first, the question last."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from infra.errors import UserError
from models.chat import control_tokens, explain, plain_text, prepare, starts_itself


class Conversation:
    """Writes for one model, by its processor of transformers. `key` is the spec's, and `path` the model's, for errors."""

    def __init__(self, processor: Any, key: str, path: str) -> None:
        if processor.chat_template is None:
            raise UserError(f"{key}: {path}: its processor has no chat template; add chat_template.jinja")
        self.processor = processor
        self.tokenizer = processor.tokenizer
        prepare(self.tokenizer)
        self._control = control_tokens(self.tokenizer)
        self._where = f"{key}: {path}"

    def text(self, num_images: int, question: str) -> str:
        """One turn of a user, with a placeholder for each image, up to where the answer begins."""
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": plain_text(question, self._control)}]
        written = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return str(written)

    def token_ids(self, num_images: int, question: str) -> list[int]:
        """The same as token ids, each image still the placeholder that the template writes."""
        text = self.text(num_images, question)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=not starts_itself(self.tokenizer, text))
        return ids

    def image_options(self, num_images: int) -> dict[str, Any]:
        """What the processor is told of images: tiles are for one large picture, not for each frame of a clip."""
        tiles = num_images > 1 and hasattr(self.processor.image_processor, "do_image_splitting")
        return {"do_image_splitting": False} if tiles else {}

    def spelled(self, word: str) -> list[int]:
        """Ids of the single tokens that spell `word`, with and without a space before it. UserError if there is none."""
        spelled = [self.tokenizer.encode(text, add_special_tokens=False) for text in (word, f" {word}")]
        single = sorted({tokens[-1] for tokens in spelled if len(tokens) == 1})
        if not single:
            raise UserError(f"{self._where}: its tokenizer has no single token for {word!r}; a judge needs Yes and No")
        return single


def load_conversation(path: str, key: str) -> Conversation:
    """That of the model in a folder. UserError where it holds no multimodal model."""
    from transformers import AutoProcessor

    try:
        return Conversation(AutoProcessor.from_pretrained(path, trust_remote_code=False), key, path)
    except UserError:
        raise
    except Exception as error:
        raise cannot_load(key, path, error) from error


def cannot_load(key: str, path: str, error: Exception) -> UserError:
    """What to raise where a library could not load a multimodal model."""
    hint = "" if find_spec("torchvision") else "; this environment has no torchvision, which Qwen-VL and SmolVLM need"
    return UserError(
        f"{key}: {path}: cannot be loaded as a multimodal model ({explain(error)}); "
        f"expected a checkpoint for transformers' AutoModelForImageTextToText{hint}"
    )
