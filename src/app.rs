//! Builds the parts, runs them until shutdown, drains.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::config::{BrokerSettings, LedgerPlace, Settings};
use crate::elevenlabs;
use crate::handler::{Handler, Timing};
use crate::health::{self, Part, Readiness};
use crate::ledger::{self, Ledger};
use crate::retry::Policy;
use crate::telemetry::chain;
use crate::worker::Worker;
use crate::{broker, retry};

/// How long the last writes may take when everything else has ended.
const LEDGER_CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// How fast to try to open a ledger whose server is away; there is no limit on attempts.
const OPENING: Policy =
    Policy { initial: Duration::from_millis(250), max: Duration::from_secs(5), horizon: None };

/// Runs the worker until SIGTERM or SIGINT. `Err` is one line for the person who started it.
pub async fn run(settings: Settings) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    stop_on_signals(&stop, &tasks)?;
    run_until(settings, stop).await
}

/// Runs the worker until `stop` is cancelled and what is in hand is settled.
pub async fn run_until(settings: Settings, stop: CancellationToken) -> anyhow::Result<()> {
    info!(
        version = env!("CARGO_PKG_VERSION"),
        elevenlabs = %settings.elevenlabs_base_url,
        broker = settings.broker.shown_url,
        prefix = settings.broker.amqp_prefix,
        ledger = %settings.ledger.place,
        prefetch = settings.broker.prefetch,
        "starting"
    );
    let address = SocketAddr::new(settings.host, settings.port);
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!(
            "cannot listen on {address}; stop what uses the port, or set PORT (and HOST) to another"
        )
    })?;
    info!(address = %listener.local_addr()?, "GET /health, /health/ready");
    let readiness = Readiness::default();
    let health = axum::serve(listener, health::router(readiness.clone()));

    let base_url = settings.elevenlabs_base_url.as_str().trim_end_matches('/').to_owned();
    let vendor = elevenlabs::Client::new(&elevenlabs::Settings {
        api_key: settings.elevenlabs_api_key,
        base_url: settings.elevenlabs_base_url,
        connect_timeout: settings.elevenlabs_connect_timeout,
        timeout: settings.elevenlabs_timeout,
    })?;
    let opened = ledger::Settings {
        location: location(settings.ledger.place),
        base_url,
        key: vendor.key_id(),
        retention: settings.ledger.retention,
        longest_request: settings.elevenlabs_timeout,
    };
    let timing = Timing {
        retry: Policy { horizon: Some(settings.retry_horizon), ..retry::VENDOR },
        settling_window: settings.settling_window,
    };
    let broker = broker_settings(settings.broker);
    let work = async {
        let Some(ledger) = open(&opened, &readiness, &stop).await? else { return Ok(()) };
        let handler = Handler::new(vendor, ledger.clone(), timing);
        let worker = Worker::new(broker, handler, readiness, settings.shutdown_grace);
        tokio::select! {
            ended = worker.run(stop.clone()) => ended?,
            () = ledger.ended() => anyhow::bail!("the ledger failed; the lines above say why"),
        }
        ledger.close(LEDGER_CLOSE_LIMIT).await;
        Ok(())
    };
    tokio::select! {
        ended = work => ended?,
        // It answers as long as the worker runs, its draining included.
        ended = health.into_future() => {
            ended.context("the health endpoint failed")?;
            anyhow::bail!("the health endpoint ended");
        }
    }
    info!("stopped");
    Ok(())
}

/// Opens the ledger, and waits for a server that is away; `None` where the worker is stopped
/// meanwhile.
async fn open(
    settings: &ledger::Settings,
    readiness: &Readiness,
    stop: &CancellationToken,
) -> anyhow::Result<Option<Ledger>> {
    let mut pace = OPENING.start();
    readiness.wrong(Part::Ledger, "it is being opened");
    loop {
        let opened = tokio::select! {
            opened = Ledger::open(settings.clone()) => opened,
            () = stop.cancelled() => return Ok(None),
        };
        let error = match opened {
            Ok(ledger) => {
                readiness.good(Part::Ledger);
                return Ok(Some(ledger));
            }
            Err(error) if error.is_away() => error,
            Err(error) => return Err(error.into()),
        };
        error!(error = chain(&error), "no ledger; trying again");
        readiness.wrong(Part::Ledger, chain(&error));
        tokio::select! {
            () = tokio::time::sleep(pace.next_wait(None).unwrap_or_default()) => {}
            () = stop.cancelled() => return Ok(None),
        }
    }
}

fn location(place: LedgerPlace) -> ledger::Location {
    match place {
        LedgerPlace::Sqlite(path) => ledger::Location::Sqlite(path),
        LedgerPlace::Postgres { url, .. } => ledger::Location::Postgres(url),
        LedgerPlace::Memory => {
            warn!(
                "LEDGER_URL=memory: every submit is forgotten when the worker ends, and may then be \
                 executed twice; for trials only"
            );
            ledger::Location::Memory
        }
    }
}

/// The adapter's own settings.
pub fn broker_settings(settings: BrokerSettings) -> broker::Settings {
    broker::Settings {
        url: settings.amqp_url,
        prefix: settings.amqp_prefix,
        declares_topology: settings.declares_topology,
        tls: broker::TlsFiles {
            authorities: settings.ca_file,
            certificate: settings.cert_file,
            key: settings.key_file,
        },
        prefetch: settings.prefetch,
    }
}

/// The first SIGTERM or SIGINT stops in order, the second at once.
fn stop_on_signals(stop: &CancellationToken, tasks: &TaskTracker) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = stop.clone();
    tasks.spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if stop.is_cancelled() {
                warn!("second signal: leaving at once; what is in hand returns to its queue");
                std::process::exit(1);
            }
            info!("signal received");
            stop.cancel();
        }
    });
    Ok(())
}
