//! Measurements and long trials: `cargo bench -p test-and-set --bench store -- COMMAND`.

#[path = "../tests/support/mod.rs"]
mod support;

use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Bench {
    #[command(subcommand)]
    what: What,
    /// Passed by cargo.
    #[arg(long, global = true, hide = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum What {
    /// The latency of verdicts of three local members, beside that of etcd's transactions.
    Latency {
        #[arg(long, default_value_t = 10_000)]
        verdicts: usize,
        /// Load every CPU with a busy thread meanwhile.
        #[arg(long)]
        loaded: bool,
    },
    /// The time to the next verdict after the leader is killed.
    Failover {
        #[arg(long, default_value_t = 100)]
        kills: usize,
    },
    /// Clients while a nemesis disturbs members in network namespaces; what the clients observed is checked.
    Nemesis {
        #[arg(long, default_value_t = 300)]
        rounds: usize,
        #[arg(long, default_value_t = 16)]
        workers: usize,
        /// Milliseconds between two calls of one worker, on average.
        #[arg(long, default_value_t = 40)]
        pause_ms: u64,
        /// The seed of the faults and calls; random by default.
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Garbage, oversized and slow clients.
    Hostile {
        #[arg(long, default_value_t = 10_000)]
        clients: usize,
    },
    /// Memory, disk and restart with many VMs.
    Scale {
        #[arg(long, default_value_t = 100_000)]
        vms: usize,
    },
}

fn main() {
    match Bench::parse().what {
        What::Latency { verdicts, loaded } => {
            if let Some(why) = support::Etcd::missing() {
                return println!("SKIPPED: {why}");
            }
            let beside = support::latency::beside_etcd(verdicts, loaded);
            println!("verdict of three members, mutual TLS:          {}", beside.ours);
            println!("transaction of three etcd nodes, mutual TLS:   {}", beside.with_tls);
            println!("transaction of three etcd nodes, plain:        {}", beside.plain);
        }
        What::Failover { kills } => {
            println!("leader killed to next verdict:   {}", support::latency::failover(kills));
        }
        What::Nemesis { rounds, workers, pause_ms, seed } => {
            if let Some(why) = support::net::Net::missing() {
                return println!("SKIPPED: {why}");
            }
            let seed = seed.unwrap_or_else(rand::random);
            println!("seed {seed}");
            let pause = std::time::Duration::from_millis(pause_ms);
            println!("{}", support::nemesis::run(&support::nemesis::Plan { rounds, workers, pause, seed }));
        }
        What::Hostile { clients } => println!("{}", support::hostile::run(clients)),
        What::Scale { vms } => println!("{}", support::scale::run(vms)),
    }
}
