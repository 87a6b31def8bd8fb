-- What is needed to finish a submit whose message does not come back, and to know whose a batch is.

-- A hash of the body's raw bytes.
ALTER TABLE submits ADD COLUMN body BLOB;
-- When the last request of any holder is over.
ALTER TABLE submits ADD COLUMN busy_until INTEGER;
-- The hashes of the API keys of its attempts, 16 bytes each.
ALTER TABLE submits ADD COLUMN keys BLOB;
-- When the row was changed last.
ALTER TABLE submits ADD COLUMN touched_at INTEGER NOT NULL DEFAULT 0;
-- What its result and the search for its batch need, as JSON; null once the result is published.
ALTER TABLE submits ADD COLUMN origin TEXT;
-- Whether the broker has its result. Rows of the former version count as published.
ALTER TABLE submits ADD COLUMN published INTEGER NOT NULL DEFAULT 1;
-- Its batch, and the hash of the API key that sees it.
ALTER TABLE submits ADD COLUMN batch_id TEXT;
ALTER TABLE submits ADD COLUMN batch_key BLOB;

UPDATE submits SET batch_id = json_extract(ending, '$.outcome.succeeded.batch_id') WHERE ending IS NOT NULL;

CREATE INDEX submits_unfinished ON submits (touched_at)
    WHERE (settled_at IS NULL AND origin IS NOT NULL) OR published = 0;
CREATE INDEX submits_to_cancel ON submits (touched_at) WHERE settled_at IS NOT NULL AND struck_until IS NOT NULL;
CREATE INDEX submits_batch_id ON submits (batch_id) WHERE batch_id IS NOT NULL;
CREATE INDEX submits_batch_key ON submits (batch_key, settled_at) WHERE batch_key IS NOT NULL;

-- The ElevenLabs that the rows speak of, and when the queues were first seen empty.
ALTER TABLE owner ADD COLUMN base_url TEXT;
ALTER TABLE owner ADD COLUMN drained_at INTEGER;

-- A ledger of the former version has been in use with its queues.
UPDATE owner SET drained_at = 0 WHERE EXISTS (SELECT 1 FROM submits);
