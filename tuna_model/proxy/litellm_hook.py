"""The proxy's work inside LiteLLM's proxy, as one of its callbacks.

    litellm_settings:
      callbacks: tuna_model.proxy.litellm_hook.hook

TUNA_PROXY_CONFIG names the TOML file with stores and styles; its upstreams are not used. LiteLLM calls the
hook for chat completions and responses, not for every route of Anthropic's messages (BerriAI/litellm#27518):
`tuna proxy` in front of LiteLLM has those too.
"""

from __future__ import annotations

import os
from typing import Any

from litellm.integrations.custom_logger import CustomLogger

from tuna_model.proxy.apis import CHAT, MESSAGES, RESPONSES
from tuna_model.proxy.settings import ProxySettings
from tuna_model.proxy.tagger import Tagger

_APIS = {
    **dict.fromkeys(("completion", "acompletion"), CHAT),
    **dict.fromkeys(("responses", "aresponses"), RESPONSES),
    **dict.fromkeys(("anthropic_messages", "pass_through_endpoint"), MESSAGES),
}


class TagHook(CustomLogger):  # type: ignore[misc]
    """Writes tags into requests before LiteLLM sends them on."""

    def __init__(self) -> None:
        super().__init__()
        self._tagger: Tagger | None = None

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        if (api := _APIS.get(call_type)) is None:
            return data
        if self._tagger is None:  # in LiteLLM's event loop, whose it will be
            self._tagger = Tagger(ProxySettings.read(os.environ["TUNA_PROXY_CONFIG"]))
        tagged = await self._tagger.tag(data, api)
        return data if tagged.fields is None else tagged.fields


hook = TagHook()
