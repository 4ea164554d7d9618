//! `vmft-store keys`: makes keys, and says whose are accepted.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use test_and_set::keys::manage::{self, AcceptedAs};
use test_and_set::keys::{KeysError, make_set};
use test_and_set::names::{KeyId, PartyName};
use test_and_set::wire::NodeId;

use crate::print;

/// Make keys, or change which ones are accepted. Servers read a changed directory within a second.
#[derive(Subcommand)]
pub enum KeysCommand {
    /// Make the keys and certificates of all parties at once, for a trial. Each party gets a directory, complete and ready to be
    /// copied to its host.
    Set {
        /// The directory in which to make one directory for each party; files in it are never overwritten.
        dir: PathBuf,
        /// The numbers of the members, separated by commas.
        #[arg(long, value_delimiter = ',', default_value = "1,2,3")]
        members: Vec<NodeId>,
        /// The names of the hosts that run VMs, separated by commas.
        #[arg(long, value_delimiter = ',')]
        hosts: Vec<String>,
        /// The names of the operators, separated by commas. A name that is also a host's is one party with one key.
        #[arg(long, value_delimiter = ',')]
        operators: Vec<String>,
    },
    /// Make a party's key where it is used: DIR/own.key, which never has to leave this host, and its certificate DIR/own.crt, which
    /// others accept. Prints the key's id.
    New {
        /// The party's directory of keys.
        dir: PathBuf,
        /// The party's name, or a member's number. Nobody checks the name in a certificate; it helps to tell them apart.
        #[arg(long)]
        name: String,
    },
    /// Accept a party's certificate, beside those of it that are accepted already. Prints the key's id: compare it with what the party
    /// sees.
    Accept {
        /// This party's directory of keys.
        dir: PathBuf,
        #[command(flatten)]
        who: PartyArgs,
        /// The party's certificate: a copy of its own.crt.
        certificate: PathBuf,
    },
    /// Accept a party no longer, or one of its keys. Connections that use it end within two seconds.
    Remove {
        /// This party's directory of keys.
        dir: PathBuf,
        #[command(flatten)]
        who: PartyArgs,
        /// Only the certificate with this key; all of the party's if it is not given.
        #[arg(long)]
        key: Option<KeyId>,
    },
    /// Make the key that is to replace this party's: own.new.key and own.new.crt. Prints its id.
    Renew {
        /// The party's directory of keys.
        dir: PathBuf,
    },
    /// Put own.new.key and own.new.crt in the place of own.key and own.crt. First let the others accept own.new.crt.
    UseNew {
        /// The party's directory of keys.
        dir: PathBuf,
    },
    /// Show this party's key, and whose keys it accepts: their ids and files.
    Show {
        /// The party's directory of keys.
        dir: PathBuf,
    },
}

/// As what a party is accepted.
#[derive(Args)]
#[group(required = true, multiple = false)]
pub struct PartyArgs {
    /// A host that runs VMs (for a member of the store).
    #[arg(long, value_name = "NAME")]
    host: Option<PartyName>,
    /// An operator (for a member of the store).
    #[arg(long, value_name = "NAME")]
    operator: Option<PartyName>,
    /// A member of the store (for everybody).
    #[arg(long, value_name = "NUMBER")]
    member: Option<NodeId>,
    /// A host that may form a pair with this one (for a host).
    #[arg(long, value_name = "NAME")]
    peer: Option<PartyName>,
}

impl PartyArgs {
    /// The one that is given.
    fn party(self) -> Option<AcceptedAs> {
        let of = |name: Option<PartyName>, kind: fn(PartyName) -> AcceptedAs| name.map(kind);
        of(self.host, AcceptedAs::Host)
            .or_else(|| of(self.operator, AcceptedAs::Operator))
            .or_else(|| of(self.peer, AcceptedAs::Peer))
            .or_else(|| self.member.map(AcceptedAs::Member))
    }
}

impl KeysCommand {
    /// Does it, and prints the ids of the keys that it is about.
    pub fn run(self) -> Result<(), Box<dyn std::error::Error>> {
        let lines = self.lines()?;
        if lines.is_empty() { Ok(()) } else { Ok(print(&lines.join("\n"))?) }
    }

    fn lines(self) -> Result<Vec<String>, KeysError> {
        let one = |key: KeyId| vec![key.to_string()];
        Ok(match self {
            KeysCommand::Set { dir, members, hosts, operators } => {
                make_set(&dir, &members, &hosts, &operators)?;
                vec![]
            }
            KeysCommand::New { dir, name } => one(manage::new(&dir, &name)?),
            KeysCommand::Accept { dir, who, certificate } => match who.party() {
                Some(who) => one(manage::accept(&dir, &who, &certificate)?),
                None => vec![],
            },
            KeysCommand::Remove { dir, who, key } => match who.party() {
                Some(who) => manage::remove(&dir, &who, key.as_ref())?.iter().map(KeyId::to_string).collect(),
                None => vec![],
            },
            KeysCommand::Renew { dir } => one(manage::renew(&dir)?),
            KeysCommand::UseNew { dir } => one(manage::use_new(&dir)?),
            KeysCommand::Show { dir } => manage::list(&dir).iter().map(ToString::to_string).collect(),
        })
    }
}
