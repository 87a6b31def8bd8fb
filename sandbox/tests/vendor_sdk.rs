//! The vendor's own Python SDK takes the sandbox for the vendor.

mod support;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use elevenlabs_sandbox::Route;
use support::{KEY, vendor};
use tokio::process::Command;
use tokio::time::timeout;

/// Importing the SDK alone takes seconds on a small machine.
const LIMIT: Duration = Duration::from_secs(120);

fn interpreter() -> PathBuf {
    let prepared = || {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        workspace.join("target/python/bin/python")
    };
    let python = std::env::var_os("SDK_PYTHON").map_or_else(prepared, PathBuf::from);
    assert!(
        python.exists(),
        "no Python with the vendor's SDK at {}; prepare it with: script/test (or set SDK_PYTHON)",
        python.display()
    );
    python
}

#[tokio::test]
async fn the_vendors_own_sdk_takes_the_sandbox_for_the_vendor() {
    let vendor = vendor().await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vendor_sdk.py");
    let mut python = Command::new(interpreter());
    python
        .arg(script)
        .args([vendor.sandbox.base_url().as_str(), KEY])
        // Neither a key nor a proxy of the machine may come into play.
        .env_clear()
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = timeout(LIMIT, python.output()).await.expect("the SDK hangs").unwrap();
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}\n{}", said(&output.stdout), said(&output.stderr));
    assert_eq!(said(&output.stdout).trim_end(), "every answer was understood");
    // It did call the sandbox, and every route of it.
    let requests = vendor.sandbox.requests();
    for route in [
        Route::Submit,
        Route::Get,
        Route::List,
        Route::Cancel,
        Route::Retry,
        Route::Delete,
        Route::Export,
    ] {
        assert!(requests.iter().any(|request| request.route == route), "no call of {route:?}");
    }
}
