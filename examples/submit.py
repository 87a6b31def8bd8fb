"""Submits one batch of calls and prints its id: python submit.py [body.json [message_id]]   (needs: pip install pika)

Exit code 0: the batch exists. 1: the submit failed. 2: could not ask, or no result came in time.
"""

import json
import os
import sys
import uuid
from pathlib import Path

import pika
from pika.exceptions import AMQPError

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/%2f")
PREFIX = os.environ.get("AMQP_PREFIX", "call-manager")
WAIT_SECONDS = 120
EXAMPLE = {
    "call_name": "Recordatorio de citas",
    "agent_id": "agent_8101kf2vq3e5bn7c9r4t6y1m0x2z",
    "agent_phone_number_id": "phnum_3301kf2vq3e5bn7c9r4t6y1m0x2z",
    "recipients": [
        {"phone_number": "+1234567890", "dynamic_variables": {"nombre": "Ana", "cita": "lunes a las 9"}},
        {"phone_number": "+0987654321", "dynamic_variables": {"nombre": "Luis", "cita": "lunes a las 10"}},
    ],
    "scheduled_time_unix": None,  # None: now
    "phone_provider": "twilio",
}


def submit(body, message_id):
    with pika.BlockingConnection(pika.URLParameters(URL)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()  # a publish returns once a queue has the message, or raises
        queue = channel.queue_declare("", exclusive=True).method.queue
        ids = {"message_id": message_id, "correlation_id": message_id, "reply_to": queue}
        properties = pika.BasicProperties(**ids, content_type="application/json", delivery_mode=2)  # 2: persistent
        channel.basic_publish(f"{PREFIX}.commands", "batch-calling.submit", body, properties, mandatory=True)
        _, properties, reply = next(channel.consume(queue, auto_ack=True, inactivity_timeout=WAIT_SECONDS))
    if reply is None:
        raise TimeoutError("no result yet")
    result = json.loads(reply)
    print(result["data"]["id"] if result["success"] else f"{properties.headers['error_code']}: {result['error']}")
    return 0 if result["success"] else 1


# One id per command, made once and stored with it. In doubt (no confirm, no result), publish the same body again with
# the same id: that never makes a second batch. A new id is a new campaign.
file, message_id = (sys.argv[1:] + [None, None])[:2]
message_id = message_id or str(uuid.uuid4())
try:
    sys.exit(submit(Path(file).read_bytes() if file else json.dumps(EXAMPLE), message_id))
except (AMQPError, OSError) as error:
    print(f"{error!r}\nTo ask again, publish the same body with message_id {message_id}", file=sys.stderr)
    sys.exit(2)
