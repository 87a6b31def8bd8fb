-- One row per submit, and per submit that a cancel struck out before it came. Times are milliseconds since 1970, by the
-- clock of this server.
CREATE TABLE call_manager_submits (
    -- The C collation is the order in which all workers lock rows.
    command_id   text COLLATE "C" PRIMARY KEY,
    -- Tells two bodies apart; null while there is only a strike.
    fingerprint  uuid,
    -- Who has it in hand: the claim, and the worker that made it.
    token        uuid,
    worker       uuid,
    lease_until  bigint,
    -- From when on a request may have left.
    sent_from    bigint,
    attempts     bigint,
    -- Until when it must not be begun.
    struck_until bigint,
    -- How it ended, as JSON.
    settled_at   bigint,
    ending       text
);

-- For the removal of what is old.
CREATE INDEX call_manager_submits_settled_at ON call_manager_submits (settled_at) WHERE settled_at IS NOT NULL;
CREATE INDEX call_manager_submits_only_struck ON call_manager_submits (struck_until) WHERE fingerprint IS NULL;
