"""A tool for verl's own tool agent, and a parser that finds a call in whatever an untaught model writes.

verl loads this file in its agent workers (multi_turn.function_tool_path).
"""

import json

from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.tools.function_tool import function_tool


@function_tool
def calculator(text: str) -> str:
    """Says how long a text is.

    Args:
        text: What the model wrote.
    """
    return f"{len(text)} characters"


@ToolParser.register("everything")
class EverythingIsACall(ToolParser):
    """Every turn of the assistant is a call of the calculator."""

    async def extract_tool_calls(self, responses_ids, tools=None):
        text = self.tokenizer.decode(responses_ids)
        return text, [FunctionCall(name="calculator", arguments=json.dumps({"text": text}))]
