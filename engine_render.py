"""The messages or the prompt of a `generate` body as the engine's input (SPEC section 8.1).

Owns which chat template is applied and how. Knows nothing of calls and what becomes of them.
"""

import argparse
from typing import Any, cast

from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.renderers.params import ChatParams
from vllm.v1.engine.async_llm import AsyncLLM

from errors import RequestError
from protocol import GenerateBody


async def render(
    llm: AsyncLLM, args: argparse.Namespace, template: str | None, body: GenerateBody
) -> Any:
    """Return the engine's input: chat template applied, or prompt taken as it is; tokenised."""
    renderer = llm.renderer
    if body.messages is None:
        prompt: Any = body.prompt
        if isinstance(prompt, list):
            prompt = {"prompt_token_ids": prompt}
        parsed = parse_model_prompt(llm.model_config, prompt)
        (rendered,) = await renderer.render_cmpl_async([parsed])
        return rendered
    kwargs = {
        **(args.default_chat_template_kwargs or {}),
        **(body.chat_template_kwargs or {}),
    }
    if "chat_template" in kwargs and not args.trust_request_chat_template:
        raise RequestError(
            "a chat template of the request's own needs TRUST_REQUEST_CHAT_TEMPLATE=true "
            "on the worker",
            param="chat_template_kwargs",
        )
    continued = bool(body.continue_final_message)
    generation_prompt = body.add_generation_prompt
    if continued and generation_prompt:
        raise RequestError("`continue_final_message` excludes `add_generation_prompt`")
    params = ChatParams(
        chat_template=template,
        chat_template_content_format=args.chat_template_content_format,
        chat_template_kwargs={
            **kwargs,
            "add_generation_prompt": not continued
            if generation_prompt is None
            else generation_prompt,
            "continue_final_message": continued,
            "tokenize": False,
        },
    )
    try:
        _, (rendered,) = await renderer.render_chat_async([cast(Any, body.messages)], params)
    except (LookupError, AttributeError) as error:  # what a message lacks
        raise RequestError(
            "generate: `messages` holds something that is not a chat message", param="messages"
        ) from error
    return rendered
