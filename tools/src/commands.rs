//! One file per subcommand, and what they share.

mod audit;
mod certs;
mod container;
mod daemon;
mod docker;
mod doctor;
mod donor;
mod list;
mod locks;
mod metad;
mod node;
mod pull;
mod remove;
mod setup;
mod snapshotter;
mod status;
mod up;
mod why;

use std::{io::IsTerminal as _, process::ExitCode, sync::Arc, time::Duration};

use crate::{
    cli::{Cli, Command},
    config::{File, Places, RdmaDevice, TransportChoice},
    failure::{self, Code},
    link::Ways,
    output,
    stop::Stop,
    waiting,
};
use anyhow::Context as _;
use clap::CommandFactory as _;
use harbour_metad_client::{
    Client, Endpoint, Error as ClientError, Trust,
    tls::{Identity, TlsError},
};
use harbour_pool::{tcp::Veil, verbs::Devices};

/// What every subcommand gets.
pub struct Context {
    /// Resolved places.
    pub places: Places,
    /// The configuration file's content.
    pub file: File,
    /// The file itself, for child processes.
    pub config: Option<std::path::PathBuf>,
    /// How often `-v` was given.
    pub verbose: u8,
}

/// Runs the subcommand.
pub fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match &cli.command {
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "harbour", &mut script);
            output::say(&String::from_utf8_lossy(&script))?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Man { dir } => {
            std::fs::create_dir_all(dir)
                .with_context(|| format!("cannot create {}", dir.display()))?;
            clap_mangen::generate_to(Cli::command(), dir)
                .with_context(|| format!("cannot write manual pages to {}", dir.display()))?;
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    let file = File::load(cli.config.as_deref())?;
    let places = Places::new(cli.paths.over(file.paths()))?;
    let context = Context {
        places,
        file,
        config: cli.config,
        verbose: cli.verbose,
    };
    start_log(&cli.command, cli.verbose);
    match cli.command {
        Command::Up(args) => up::up(&context, args),
        Command::Down(args) => up::down(&context, &args),
        Command::Pull(args) => pull::run(&context, args),
        Command::Images(args) => list::images(&context, &args),
        Command::Layers(args) => list::layers(&context, &args),
        Command::Donors(args) => list::donors(&context, &args),
        Command::Locks(args) => locks::locks(&context, &args),
        Command::Rm(args) => remove::run(&context, &args),
        Command::Status(args) => status::run(&context, &args),
        Command::Audit(args) => audit::run(&context, &args),
        Command::Why(args) => why::run(&context, &args),
        Command::Run(args) => container::run(&context, args),
        Command::Bundle(args) => container::bundle(&context, args),
        Command::Mount(args) => container::mount(&context, &args),
        Command::Umount(args) => container::umount(&context, &args),
        Command::Docker(args) => docker::run(&context, &args),
        Command::Setup(args) => setup::run(&context, args.command),
        Command::Doctor(args) => doctor::run(&context, &args),
        Command::Donor(args) => donor::run(&context, args),
        Command::Metad(args) => metad::run(&context, args),
        Command::Node(args) => node::run(&context, args),
        Command::Snapshotter(args) => snapshotter::run(&context, args),
        Command::Certs(args) => certs::run(&context, &args.command),
        Command::Completions { .. } | Command::Man { .. } => Ok(ExitCode::SUCCESS),
    }
}

/// Logs go to standard error; daemons say what they do, other subcommands only what is wrong.
fn start_log(command: &Command, verbose: u8) {
    let daemon = matches!(
        command,
        Command::Up(_)
            | Command::Donor(_)
            | Command::Metad(_)
            | Command::Node(_)
            | Command::Snapshotter(_)
    ) || matches!(command, Command::Docker(args) if args.follows());
    let level = match (verbose, daemon) {
        (0, false) => "warn",
        (0, true) => "info",
        (1, _) => "debug",
        _ => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("HARBOUR_LOG").unwrap_or_else(|_| {
        tracing_subscriber::EnvFilter::new(format!("{level},h2=warn,hyper=warn,tower=warn"))
    });
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .try_init();
}

impl Context {
    /// A runtime for the client side: a thread for the channel, one for the rest.
    pub fn runtime(&self) -> anyhow::Result<tokio::runtime::Runtime> {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .context("cannot start the runtime")
    }

    /// The ways to donors that a part may take whose section of the file says this.
    pub fn ways(
        &self,
        transport: Option<TransportChoice>,
        device: Option<&RdmaDevice>,
    ) -> anyhow::Result<Ways> {
        let veiled_only = self.places.tls_data;
        // Donors may want TLS of whoever reads from them: with certificates at hand that needs no flag.
        let tls = matches!(self.endpoint()?, Endpoint::Tls { .. });
        let veil = if veiled_only || tls {
            let identity = Arc::new(Identity::load(&self.places.tls)?);
            let other = Arc::clone(&identity);
            Some(Veil::new(
                move || identity.data_client(),
                move || other.data_server(),
            ))
        } else {
            None
        };
        Ok(Ways {
            preference: self.file.preference(self.places.transport, transport),
            devices: self.devices(device),
            veil,
            veiled_only,
        })
    }

    /// The RDMA devices that such a part may use.
    pub fn devices(&self, device: Option<&RdmaDevice>) -> Devices {
        self.file.devices(self.places.rdma_device.as_ref(), device)
    }

    /// Where metad is.
    pub fn endpoint(&self) -> anyhow::Result<Endpoint> {
        self.places.metad.parse().map_err(|error| {
            failure::failure(
                Code::Usage,
                format!(
                    "{:?} is not an address of metad: {error}",
                    self.places.metad
                ),
                "write unix:/PATH, https://HOST:PORT, or http://HOST:PORT on this host",
            )
        })
    }

    /// A connected client. Fails at once, with a next step, when metad is not there.
    pub async fn client(&self) -> anyhow::Result<Client> {
        let (endpoint, trust) = (self.endpoint()?, self.trust()?);
        Ok(Client::connect_with(&endpoint, &trust, Duration::from_secs(10)).await?)
    }

    /// The same, where metad may be on its way up: it is waited for a little.
    pub async fn client_soon(&self, stop: &Stop) -> anyhow::Result<Client> {
        let (endpoint, trust) = (self.endpoint()?, self.trust()?);
        let connect = || Client::connect_with(&endpoint, &trust, Duration::from_secs(10));
        Ok(waiting::for_metad(&stop.flag(), connect).await?)
    }

    /// What the connection to metad rests on. Certificates are looked at where they are needed.
    pub fn trust(&self) -> anyhow::Result<Trust> {
        let identity = match self.endpoint()? {
            Endpoint::Tls { .. } => Some(Arc::new(Identity::load(&self.places.tls)?)),
            Endpoint::Unix(_) | Endpoint::Tcp { .. } => None,
        };
        Ok(Trust {
            identity,
            plain: self.places.insecure_metad,
        })
    }

    /// A client for a daemon, which outlives metad: it asks again until metad is there.
    pub async fn patient_client(&self, stop: &Stop) -> anyhow::Result<Option<Client>> {
        let (endpoint, trust) = (self.endpoint()?, self.trust()?);
        let mut pause = Duration::from_millis(20);
        let mut said = false;
        loop {
            match Client::connect_with(&endpoint, &trust, Duration::from_secs(10)).await {
                Ok(client) => return Ok(Some(client)),
                // What this host does wrong does not mend itself; what metad does wrong may.
                Err(ClientError::Tls {
                    source: source @ (TlsError::Plain { .. } | TlsError::NoIdentity { .. }),
                    ..
                }) => return Err(source.into()),
                Err(ClientError::Tls { source, .. }) if !said => {
                    said = true;
                    tracing::warn!(error = %source, next = source.next(), "asking metad again until it is mended");
                }
                Err(error) => tracing::debug!(%error, "metad is not there yet"),
            }
            if stop.within(pause).await {
                return Ok(None);
            }
            pause = (pause * 2).min(Duration::from_secs(2));
        }
    }
}
