"""Prompts as a chat model was trained on them: the tokenizer's own template around what a user says."""

from __future__ import annotations

from tl_factedit.backend.protocol import Model, bos_policy, kind, model_name


def chat_prompt(model: Model, text: str, *, system: str | None = None) -> str:
    """What a user says, in the model's chat template, up to where the model is to answer.

    A ``"{}"`` in it stays one, so that the result is a prompt of a `Fact`. It ends with the header of the answer, which
    mostly ends with a line break: targets begin without a space then (``"Paris"``). If the template begins with a BOS
    token of its own, no second one is put in front of it.

    Args:
        model: Its tokenizer has the template.
        text: What the user says.
        system: What the system says; None for what the template has for that, if anything.

    Raises:
        ValueError: The tokenizer has no chat template, or one that doesn't keep the text or has no place for `system`.

    Example:
        >>> prompt = fe.chat_prompt(model, "What is the capital of {}?")     # doctest: +SKIP
        >>> fact = fe.Fact("France", prompt, "Paris", "Rome")                # doctest: +SKIP
    """
    kind(model)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text is {text!r}, needed what the user says, such as 'What is the capital of {{}}?'")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"system is {system!r}, a {type(system).__name__}: needed text or None")
    bos_policy(model)  # it has a tokenizer
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer of {model_name(model)} has no chat template: write the prompt as text, or take a model "
            "that was trained to chat"
        )
    control = [token for token in getattr(tokenizer, "all_special_tokens", ()) if token in text]
    if control:
        raise ValueError(
            f"text holds {control[0]!r}, a token by which a chat is put together: give what the user says, not "
            "a prompt that chat_prompt has made"
        )
    said = [("system", system), ("user", text)]
    messages = [{"role": role, "content": content} for role, content in said if content is not None]
    prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    for role, content in said:
        if content is not None and content.strip() not in prompt:
            raise ValueError(
                f"the chat template of {model_name(model)} doesn't keep what the {role} says ({content!r})"
            )
    if prompt.count("{}") != text.count("{}"):
        raise ValueError(
            f'the chat prompt holds {prompt.count("{}")} "{{}}" and the text {text.count("{}")}, needed as many: only '
            "the text is to hold one"
        )
    return prompt
