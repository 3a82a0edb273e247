"""How a folder's tokenizer encodes and decodes test texts, as JSON; as a script it runs without jaxft."""

import json
import sys

TEXTS = ["Hello  world 12345 it's", " a\n\n b\t", "héllo <|eot_id|>x<|im_end|>\n ok", "</s>", ""]
CHAT = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "Yes"}]
NAMES = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def behaviour(tokenizer):
    """Ids, texts, a rendered conversation and special ids of a tokenizer."""
    ids = [tokenizer(text).input_ids for text in TEXTS]
    return {
        "ids": ids,
        "texts": [tokenizer.decode(x, skip_special_tokens=True) for x in ids],
        "chat": tokenizer.chat_template
        and tokenizer.apply_chat_template(CHAT, tokenize=False, date_string="26 Jul 2024"),
        "special": [getattr(tokenizer, name) for name in NAMES],
        "vocabulary": len(tokenizer.get_vocab()),
        "largest": max(tokenizer.get_vocab().values()),
        "added": {str(number): token.content for number, token in tokenizer.added_tokens_decoder.items()},
    }


if __name__ == "__main__":
    import transformers

    read = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    print(json.dumps({"version": transformers.__version__, **behaviour(read)}))
