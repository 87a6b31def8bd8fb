"""Drives the sandbox with the vendor's own SDK and checks what its typed models make of the answers.

Called by vendor_sdk.rs with the sandbox's base URL and its key.
"""

import json
import sys
import time
import typing
import urllib.request

import httpx
from elevenlabs.client import ElevenLabs
from elevenlabs.core.api_error import ApiError
from elevenlabs.core.request_options import RequestOptions
from elevenlabs.errors.unprocessable_entity_error import UnprocessableEntityError
from elevenlabs.types import (
    BatchCallDetailedResponse,
    BatchCallResponse,
    ConversationInitiationClientDataRequestInput,
    OutboundCallRecipient,
    WorkspaceBatchCallsResponse,
)
from elevenlabs.types.telephony_call_config_input import TelephonyCallConfigInput

BASE_URL, KEY = sys.argv[1:]
# The SDK repeats a failed submit by itself, which would call everybody twice.
ONCE: RequestOptions = {"max_retries": 0, "timeout_in_seconds": 30}
BATCH_STATUSES = {"pending", "in_progress", "completed", "failed", "cancelled"}
CALL_STATUSES = BATCH_STATUSES | {"dispatched", "initiated", "voicemail"}
VARIABLES = {"name": "Zoë", "visits": 3, "balance": 12.5, "vip": True, "campaign_key": "k-1"}


def only_the_sandbox(event: str, arguments: tuple) -> None:
    """Ends the script where anything but the sandbox is called."""
    if event == "socket.connect" and arguments[1][0] != "127.0.0.1":
        raise RuntimeError(f"a connection to {arguments[1]}")
    if event == "socket.getaddrinfo" and arguments[0] != "127.0.0.1":
        raise RuntimeError(f"a look-up of {arguments[0]}")


def client(key: str):
    # Without the machine's proxy settings, and nowhere but to the sandbox.
    http = httpx.Client(trust_env=False, timeout=30)
    return ElevenLabs(base_url=BASE_URL, api_key=key, httpx_client=http).conversational_ai.batch_calls


def control(path: str, body: dict) -> None:
    request = urllib.request.Request(f"{BASE_URL}/sandbox/{path}", json.dumps(body).encode(), method="POST")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    assert opener.open(request, timeout=30).status == 200


def is_strictly(model: type, answer: typing.Any) -> None:
    """The SDK builds its models without checking them; this checks every field by its type."""
    assert type(answer) is model, type(answer)
    model.model_validate(json.loads(answer.model_dump_json()), strict=True)
    declared = {name for name, field in model.model_fields.items() if field.is_required()}
    assert declared <= answer.model_fields_set, declared - answer.model_fields_set


def refused(call: typing.Callable[[], typing.Any], status: int, code: str) -> None:
    try:
        call()
    except ApiError as error:
        assert error.status_code == status, error
        detail = error.body["detail"]
        assert detail["code"] == code, detail
        assert detail["message"] and detail["request_id"] == error.headers["request-id"], detail
    else:
        raise AssertionError(f"no {status}")


def create(calls, name: str, numbers: list, **more) -> BatchCallResponse:
    return calls.create(
        call_name=name,
        agent_id="agent_1",
        agent_phone_number_id="phnum_sip_1",
        recipients=[
            OutboundCallRecipient(
                phone_number=number,
                conversation_initiation_client_data=ConversationInitiationClientDataRequestInput(
                    user_id="user-1", dynamic_variables=VARIABLES
                ),
            )
            for number in numbers
        ],
        request_options=ONCE,
        **more,
    )


def main() -> None:
    sys.addaudithook(only_the_sandbox)
    calls = client(KEY)
    begun = int(time.time())

    made = create(
        calls,
        "Recall",
        ["+14155550100", "+14155550107", "+14155550109"],
        timezone="Europe/Berlin",
        target_concurrency_limit=3,
        telephony_call_config=TelephonyCallConfigInput(ringing_timeout_secs=30),
    )
    is_strictly(BatchCallResponse, made)
    assert made.name == "Recall" and made.agent_id == "agent_1", made
    assert made.phone_number_id == "phnum_sip_1" and made.phone_provider == "sip_trunk", made
    assert made.status == "pending" and made.retry_count == 0, made
    assert made.timezone == "Europe/Berlin" and made.target_concurrency_limit == 3, made
    assert made.telephony_call_config.ringing_timeout_secs == 30, made
    assert made.telephony_call_config.twilio_call_recording_enabled is False, made
    assert made.total_calls_scheduled == 3 and made.total_calls_dispatched == 0, made
    assert made.scheduled_time_unix == made.created_at_unix, made
    assert abs(made.created_at_unix - begun) < 60, made
    assert made.model_extra["sandbox_extra"]["adequacy"] == 1.0, made

    got = calls.get(made.id, request_options=ONCE)
    is_strictly(BatchCallDetailedResponse, got)
    assert (got.id, got.name, got.status) == (made.id, made.name, "pending"), got
    assert [r.phone_number for r in got.recipients] == ["+14155550100", "+14155550107", "+14155550109"]
    for recipient in got.recipients:
        assert recipient.id and recipient.status == "pending", recipient
        assert recipient.conversation_id is None, recipient
        data = recipient.conversation_initiation_client_data
        assert data.user_id == "user-1", data
        assert data.dynamic_variables == VARIABLES, data
        assert list(data.dynamic_variables) == list(VARIABLES), data

    others = [create(calls, f"Other {number}", ["+14155550100"]) for number in range(4)]
    newest_first = [batch.id for batch in reversed([made, *others])]
    seen, cursor = [], None
    while True:
        page = calls.list(limit=2, last_doc=cursor, agent_id="agent_1", request_options=ONCE)
        is_strictly(WorkspaceBatchCallsResponse, page)
        seen += [batch.id for batch in page.batch_calls]
        cursor = page.next_doc
        if not page.has_more:
            break
    assert seen == newest_first, (seen, newest_first)
    assert len(calls.list(request_options=ONCE).batch_calls) == 5
    assert calls.list(agent_id="agent_2", request_options=ONCE).batch_calls == []

    cancelled = calls.cancel(others[0].id, request_options=ONCE)
    is_strictly(BatchCallResponse, cancelled)
    assert cancelled.id == others[0].id and cancelled.status == "cancelled", cancelled
    assert calls.get(others[0].id, request_options=ONCE).recipients[0].status == "cancelled"
    refused(lambda: calls.cancel(others[0].id, request_options=ONCE), 400, "already_cancelled")

    assert calls.delete(others[1].id, request_options=ONCE) is None
    refused(lambda: calls.get(others[1].id, request_options=ONCE), 404, "batch_call_not_found")

    met = set()
    for _ in range(50):
        moving = calls.get(made.id, request_options=ONCE)
        is_strictly(BatchCallDetailedResponse, moving)
        met |= {r.status for r in moving.recipients}
        assert moving.status in BATCH_STATUSES, moving.status
        control("advance", {"seconds": 1})
    assert met == CALL_STATUSES - {"cancelled", "voicemail"}, met
    ended = calls.get(made.id, request_options=ONCE)
    assert ended.status == "completed" and ended.total_calls_finished == 3, ended
    assert [r.status for r in ended.recipients] == ["completed", "failed", "failed"], ended
    assert ended.recipients[0].conversation_id.startswith("conv_"), ended

    table = b"".join(calls.export(made.id, request_options=ONCE)).decode()
    assert table.count("\r\n") == 4 and "+14155550109" in table, table

    retried = calls.retry(made.id, request_options=ONCE)
    is_strictly(BatchCallResponse, retried)
    assert retried.retry_count == 1 and retried.status == "in_progress", retried
    control("advance", {"seconds": 60})
    statuses = [r.status for r in calls.get(made.id, request_options=ONCE).recipients]
    assert statuses == ["completed"] * 3, statuses

    refused(lambda: client("wrong").list(request_options=ONCE), 401, "invalid_api_key")
    refused(lambda: calls.get("btcal_none", request_options=ONCE), 404, "batch_call_not_found")
    try:
        create(calls, "Wrong", [], target_concurrency_limit=0)
    except UnprocessableEntityError as error:
        assert error.status_code == 422, error
        places = [wrong["loc"] for wrong in error.body["detail"]]
        assert places == [["body", "target_concurrency_limit"]], error.body
    else:
        raise AssertionError("no 422")

    print("every answer was understood")


main()
