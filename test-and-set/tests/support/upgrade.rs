//! A store whose members are replaced one at a time by a build that knows one version of the protocol more, and back.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use libtest_mimic::Failed;

use super::{Cluster, client, steady, wait_for};

/// Why there can be no newer build here, if so.
pub fn missing() -> Option<&'static str> {
    (!Path::new(env!("CARGO")).exists()).then_some("needs cargo, to build the newer release")
}

/// The programs of the newer build.
fn newer_build() -> Result<PathBuf, Failed> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/next-version");
    let built = Command::new(script).stderr(Stdio::inherit()).output()?;
    if !built.status.success() {
        return Err("scripts/next-version cannot build the newer build".into());
    }
    Ok(PathBuf::from(String::from_utf8(built.stdout)?.trim()))
}

/// Waits until a member has all of the leader's log.
fn wait_until_caught_up(cluster: &Cluster, id: usize) {
    wait_for("member that has caught up", || {
        let status = cluster.status();
        let rows: Vec<_> = status.as_array()?.iter().map(|row| &row["answer"]["status"]).collect();
        let leader = rows.iter().find(|s| s["role"] == "leader")?;
        let own = rows.iter().find(|s| s["id"] == id)?;
        let applied = |s: &serde_json::Value| s["applied_index"].as_u64();
        (applied(own)? + 50 >= applied(leader)?).then_some(())
    });
}

fn replace(cluster: &mut Cluster, id: usize, program: &Path) {
    cluster.program = program.to_owned();
    cluster.kill(id);
    cluster.start_node(id);
    wait_until_caught_up(cluster, id);
    // A while in which the versions are mixed like this.
    std::thread::sleep(Duration::from_millis(500));
}

fn newer_client(dir: &Path, url: &str) -> Result<Child, Failed> {
    let mut command = Command::new(dir.join("examples/steady_client"));
    let command = command.args([url, "newer"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    Ok(command.stderr(Stdio::piped()).spawn()?)
}

/// Lets a client end, also when the test fails.
struct StopOnDrop<'s>(&'s AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// The members are replaced under calls from clients of both builds.
pub fn one_member_at_a_time_and_back() -> Result<(), Failed> {
    let newer = newer_build()?;
    let mut cluster = Cluster::start(3);
    let (url, older) = (cluster.url(), cluster.program.clone());
    let stop = AtomicBool::new(false);
    let newer_client = newer_client(&newer, &url)?;
    std::thread::scope(|scope| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (url, stopped) = (&url, &stop);
        let older_client = scope.spawn(move || {
            runtime.block_on(async { steady::use_store(&*client(url), "older", stopped).await })
        });
        let stop = StopOnDrop(&stop);
        for program in [newer.join("vmft-store"), older] {
            for id in [1, 2, 3] {
                replace(&mut cluster, id, &program);
            }
        }
        drop(stop);
        let seen = older_client.join().map_err(|_| "the older client panicked")?;
        eprintln!("{}", seen.map_err(Failed::from)?);
        Ok::<_, Failed>(())
    })?;
    let seen = newer_client.wait_with_output()?;
    let (said, complaint) = (String::from_utf8_lossy(&seen.stdout), String::from_utf8_lossy(&seen.stderr));
    eprint!("{said}{complaint}");
    if !seen.status.success() {
        return Err(complaint.into_owned().into());
    }
    Ok(())
}
