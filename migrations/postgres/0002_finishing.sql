-- What is needed to finish a submit whose message does not come back, and to know whose a batch is.
ALTER TABLE call_manager_submits
    -- A hash of the body's raw bytes.
    ADD COLUMN body       uuid,
    -- When the last request of any holder is over.
    ADD COLUMN busy_until bigint,
    -- The hashes of the API keys of its attempts, 16 bytes each.
    ADD COLUMN keys       bytea,
    -- When the row was changed last.
    ADD COLUMN touched_at bigint NOT NULL DEFAULT 0,
    -- What its result and the search for its batch need, as JSON; null once the result is published.
    ADD COLUMN origin     text,
    -- Whether the broker has its result. Rows of the former version count as published.
    ADD COLUMN published  boolean NOT NULL DEFAULT true,
    -- Its batch, and the hash of the API key that sees it.
    ADD COLUMN batch_id   text,
    ADD COLUMN batch_key  uuid;

UPDATE call_manager_submits SET batch_id = ending::json #>> '{outcome,succeeded,batch_id}' WHERE ending IS NOT NULL;

CREATE INDEX call_manager_submits_unfinished ON call_manager_submits (touched_at)
    WHERE (settled_at IS NULL AND origin IS NOT NULL) OR NOT published;
CREATE INDEX call_manager_submits_to_cancel ON call_manager_submits (touched_at)
    WHERE settled_at IS NOT NULL AND struck_until IS NOT NULL;
CREATE INDEX call_manager_submits_batch_id ON call_manager_submits (batch_id) WHERE batch_id IS NOT NULL;
CREATE INDEX call_manager_submits_batch_key ON call_manager_submits (batch_key, settled_at)
    WHERE batch_key IS NOT NULL;

-- One row: the ElevenLabs that the submits speak of, and when the queues were first seen empty. A ledger of the former
-- version has been in use with its queues.
CREATE TABLE call_manager_ledger (
    one        boolean PRIMARY KEY DEFAULT true CHECK (one),
    base_url   text,
    drained_at bigint
);
INSERT INTO call_manager_ledger (drained_at) SELECT 0 WHERE EXISTS (SELECT 1 FROM call_manager_submits);
INSERT INTO call_manager_ledger DEFAULT VALUES ON CONFLICT DO NOTHING;
