//! A proxy, the members behind it and the clients in front of it.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use lb_common::stats::TrafficCell;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
};

use crate::{
    model::{Method, Policy, Sessions, StartTls, Terms},
    pool::{LiveMember, LivePool},
    proxy::{Fallback, MemberSecurity, Proxy, Security, Service, Services, Source, bind_listeners},
    smtp::timeouts::Timeouts,
    telemetry::session::{SessionEnd, SessionSink},
    tls::{
        ListenerTls,
        tests::{Pair, plain},
    },
};

/// No test waits longer for anything.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// What a member does with one connection.
pub(super) type Script = fn(&mut Member);

/// A member's side of one connection.
pub(super) struct Member {
    stream: Wire,
    pub(super) tls: Arc<ServerConfig>,
    pub(super) log: mpsc::Sender<Vec<u8>>,
}

enum Wire {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ServerConnection, TcpStream>>),
}

/// What a proxy is made of.
pub(super) struct Setup {
    pub(super) kind: Kind,
    pub(super) timeouts: Timeouts,
    pub(super) pair: Pair,
    pub(super) listener: Listener,
    pub(super) server: Server,
    pub(super) xclient: bool,
    /// The members for clients that stay in plaintext.
    pub(super) plaintext: Option<&'static [Script]>,
    pub(super) terms: Terms,
    /// But for the timeouts.
    pub(super) sessions: Sessions,
}

/// TLS towards clients, by the box's certificate.
pub(super) type Listener = fn(&Pair) -> Arc<ListenerTls>;

/// TLS towards members, by the certificate that they show.
pub(super) type Server = fn(&Pair) -> MemberSecurity;

impl Default for Setup {
    fn default() -> Self {
        Self {
            kind: Kind::Plain,
            timeouts: Timeouts::DEFAULT,
            pair: Pair::new(&["mx.example"]),
            listener: |pair| Arc::new(plain(&[Arc::new(pair.load().unwrap())]).unwrap()),
            server: |_| MemberSecurity::None,
            xclient: false,
            plaintext: None,
            terms: Terms::default(),
            sessions: Sessions::default(),
        }
    }
}

/// A proxy with one virtual server.
pub(super) struct Lab {
    pub(super) proxy: Option<Proxy>,
    pub(super) address: SocketAddr,
    pub(super) v6: Option<SocketAddr>,
    pub(super) services: Arc<Services>,
    pub(super) cell: &'static TrafficCell,
    pub(super) pool: Arc<LivePool>,
    pub(super) pair: Pair,
    pub(super) ends: Ends,
    pub(super) seen: mpsc::Receiver<Vec<u8>>,
}

/// Collects the session log.
#[derive(Clone, Default)]
pub(super) struct Ends(Arc<Mutex<Vec<SessionEnd>>>);

#[derive(Clone, Copy)]
pub(super) enum Kind {
    Plain,
    Implicit,
    StartTls(StartTls),
}

/// A client in plaintext or in TLS.
pub(super) struct Client<S> {
    pub(super) stream: S,
}

pub(super) type TlsClient = Client<StreamOwned<ClientConnection, TcpStream>>;

impl Lab {
    pub(super) fn new(kind: Kind, members: &[Script]) -> Self {
        Self::with(kind, members, Timeouts::DEFAULT)
    }

    pub(super) fn with(kind: Kind, members: &[Script], timeouts: Timeouts) -> Self {
        Self::of(kind, members, timeouts, Pair::new(&["mx.example"]))
    }

    pub(super) fn of(kind: Kind, members: &[Script], timeouts: Timeouts, pair: Pair) -> Self {
        let setup = Setup {
            kind,
            timeouts,
            pair,
            ..Setup::default()
        };
        Self::made(setup, members)
    }

    pub(super) fn on(kind: Kind, members: &[Script], terms: &Terms) -> Self {
        let pair = Pair::new(&["mx.example"]);
        Self::all(kind, members, pair, terms, Sessions::default())
    }

    pub(super) fn all(
        kind: Kind,
        members: &[Script],
        pair: Pair,
        terms: &Terms,
        sessions: Sessions,
    ) -> Self {
        let setup = Setup {
            kind,
            timeouts: sessions.timeouts,
            pair,
            terms: terms.clone(),
            sessions,
            ..Setup::default()
        };
        Self::made(setup, members)
    }

    pub(super) fn guarded(kind: Kind, members: &[Script], terms: &Terms, policy: Policy) -> Self {
        let lab = Self::on(kind, members, terms);
        let service = lab.services.find(lab.address).unwrap();
        lab.services.replace([Arc::new(Service {
            policies: vec![Arc::new(policy)],
            ..like(&service)
        })]);
        lab
    }

    pub(super) fn made(setup: Setup, members: &[Script]) -> Self {
        let Setup {
            kind,
            timeouts,
            pair,
            listener,
            server,
            xclient,
            plaintext,
            terms,
            sessions,
        } = setup;
        let sessions = Sessions {
            timeouts,
            ..sessions
        };
        let (log, seen) = mpsc::channel();
        let shown = Pair::new(&["member.example", "127.0.0.1"]);
        let tls = plain(&[Arc::new(shown.load().unwrap())]).unwrap().config;
        let live = |name: &str, first: usize, scripts: &[Script]| {
            let members = scripts.iter().zip(first..).map(|(script, id)| {
                let address = serve(*script, tls.clone(), log.clone());
                let name = format!("m{id}").into();
                Arc::new(LiveMember::new(name, address, id as u16, true, cell()))
            });
            let pool = LivePool::new(name.into(), Method::RoundRobin, members.collect());
            Arc::new(pool)
        };
        let pool = live("pool", 0, members);
        let plaintext = plaintext.map(|scripts| live("plaintext", members.len(), scripts));
        let tls_for_clients = listener(&pair);
        let client_tls = match kind {
            Kind::Plain => Security::None,
            Kind::Implicit => Security::Implicit(tls_for_clients),
            Kind::StartTls(policy) => Security::StartTls {
                policy,
                tls: tls_for_clients,
            },
        };
        let server_tls = server(&shown);
        let listeners = bind_listeners(&[0]).unwrap();
        let address = listeners[0].v4.local_addr().unwrap();
        let v6 = listeners[0].v6.as_ref().map(|v6| v6.local_addr().unwrap());
        let cell = cell();
        let service = |address: SocketAddr| Service {
            name: "mx".into(),
            at: address.into(),
            client_tls: client_tls.clone(),
            server_tls: server_tls.clone(),
            xclient,
            plaintext: plaintext.clone().map(Fallback::new),
            pool: pool.clone(),
            cell,
            terms: terms.clone(),
            sessions,
            source: Source::Own,
            crowd: Arc::default(),
            policies: Vec::new(),
        };
        let ends = Ends::default();
        let services = Arc::new(Services::new(
            [address].into_iter().chain(v6).map(service).map(Arc::new),
        ));
        let log = Arc::new(ends.clone());
        let proxy = Proxy::start(services.clone(), listeners, log).unwrap();
        let proxy = Some(proxy);
        Self {
            proxy,
            address,
            v6,
            services,
            cell,
            pool,
            pair,
            ends,
            seen,
        }
    }

    pub(super) fn connect(&self) -> Client<TcpStream> {
        self.connect_to(self.address)
    }

    pub(super) fn connect_to(&self, address: SocketAddr) -> Client<TcpStream> {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Client { stream }
    }

    pub(super) fn tls_config(&self) -> ClientConfig {
        self.tls_config_of(rustls::ALL_VERSIONS)
    }

    pub(super) fn tls_config_of(
        &self,
        versions: &[&'static rustls::SupportedProtocolVersion],
    ) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.pair.certificate.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider);
        let builder = builder.with_protocol_versions(versions).unwrap();
        builder.with_root_certificates(roots).with_no_client_auth()
    }

    pub(super) fn secure(&self, client: Client<TcpStream>) -> TlsClient {
        self.secure_with(client, self.tls_config())
    }

    pub(super) fn secure_with(&self, client: Client<TcpStream>, config: ClientConfig) -> TlsClient {
        let name = "mx.example".try_into().unwrap();
        let connection = ClientConnection::new(Arc::new(config), name).unwrap();
        Client {
            stream: StreamOwned::new(connection, client.stream),
        }
    }

    /// The next connection's bytes, complete.
    pub(super) fn seen(&self) -> String {
        String::from_utf8_lossy(&self.seen.recv_timeout(PATIENCE).unwrap()).into_owned()
    }

    /// The only session's end, once it is there.
    pub(super) fn end(&self) -> SessionEnd {
        self.ends.wait(1).remove(0)
    }

    pub(super) fn events(&self) -> BTreeMap<String, u64> {
        self.proxy.as_ref().unwrap().events()
    }
}

/// The same virtual server without policies and a pool for plaintext.
pub(super) fn like(service: &Service) -> Service {
    Service {
        policies: Vec::new(),
        name: service.name.clone(),
        at: service.at.clone(),
        client_tls: service.client_tls.clone(),
        server_tls: service.server_tls.clone(),
        plaintext: None,
        pool: service.pool.clone(),
        terms: service.terms.clone(),
        source: service.source.clone(),
        crowd: service.crowd.clone(),
        ..*service
    }
}

impl Ends {
    pub(super) fn wait(&self, count: usize) -> Vec<SessionEnd> {
        until("sessions to end", || self.0.lock().unwrap().len() >= count);
        self.0.lock().unwrap().clone()
    }
}

impl SessionSink for Ends {
    fn session_ended(&self, session: &SessionEnd) {
        self.0.lock().unwrap().push(session.clone());
    }
}

/// Polls with a deadline.
pub(super) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        thread::yield_now();
    }
}

impl<S: Read + Write> Client<S> {
    pub(super) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
        self.stream.flush().unwrap();
    }

    /// One reply, all its lines.
    pub(super) fn reply(&mut self) -> String {
        let mut reply = Vec::new();
        loop {
            let line = read_line(&mut self.stream).unwrap();
            assert!(
                !line.is_empty(),
                "closed after {:?}",
                String::from_utf8_lossy(&reply)
            );
            reply.extend_from_slice(&line);
            if line.get(3) != Some(&b'-') {
                return String::from_utf8(reply).unwrap();
            }
        }
    }

    pub(super) fn ask(&mut self, command: &str) -> String {
        self.send(format!("{command}\r\n"));
        self.reply()
    }

    pub(super) fn expect(&mut self, command: &str, start: &str) {
        let reply = self.ask(command);
        assert!(reply.starts_with(start), "{command:?} got {reply:?}");
    }

    /// Everything up to the end of the stream.
    pub(super) fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) | Err(_) => return rest,
                Ok(count) => rest.extend_from_slice(&buffer[..count]),
            }
        }
    }

    pub(super) fn deliver(&mut self, content: &str) {
        self.expect("MAIL FROM:<a@b>", "250 ");
        self.expect("RCPT TO:<c@d>", "250 ");
        self.expect("DATA", "354 ");
        self.send(content);
        assert_eq!(self.reply(), "250 2.0.0 taken\r\n");
    }
}

impl Member {
    pub(super) fn say(&mut self, text: &str) -> bool {
        self.stream.write_all(text.as_bytes()).is_ok()
    }

    pub(super) fn line(&mut self) -> Option<Vec<u8>> {
        read_line(&mut self.stream)
            .ok()
            .filter(|line| !line.is_empty())
    }

    /// Breaks the connection.
    pub(super) fn die(&mut self) {
        let _ = self.tcp().shutdown(Shutdown::Both);
    }

    /// Goes on in TLS; false when the other side does not.
    pub(super) fn secure(&mut self) -> bool {
        let tcp = self.tcp().try_clone().unwrap();
        let mut connection = ServerConnection::new(self.tls.clone()).unwrap();
        let mut stream = tcp;
        if connection.complete_io(&mut stream).is_err() {
            return false;
        }
        self.stream = Wire::Tls(Box::new(StreamOwned::new(connection, stream)));
        true
    }

    pub(super) fn tcp(&self) -> &TcpStream {
        match &self.stream {
            Wire::Plain(tcp) => tcp,
            Wire::Tls(stream) => &stream.sock,
        }
    }
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(tcp) => tcp.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(tcp) => tcp.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(tcp) => tcp.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

/// A server that takes all mail; reports what it read when the connection ends.
pub(super) fn good(member: &mut Member) {
    member.say("220 good ESMTP\r\n");
    converse(member, Vec::new());
}

/// As [`good`], in TLS from the first byte.
pub(super) fn implicit(member: &mut Member) {
    if member.secure() {
        good(member);
    }
}

/// As [`good`], in TLS by STARTTLS and not without.
pub(super) fn starttls(member: &mut Member) {
    member.say("220 good ESMTP\r\n");
    let mut seen = Vec::new();
    while let Some(line) = member.line() {
        seen.extend_from_slice(&line);
        if line.starts_with(b"STARTTLS") {
            member.say("220 go\r\n");
            if member.secure() {
                return converse(member, seen);
            }
            break;
        }
        member.say(match line.starts_with(b"EHLO") {
            true => "250-good\r\n250-CHUNKING\r\n250 STARTTLS\r\n",
            false => "530 TLS first\r\n",
        });
    }
    seen.extend_from_slice(b"PLAIN");
    let _ = member.log.send(seen);
}

fn converse(member: &mut Member, mut seen: Vec<u8>) {
    let mut end = "FIN";
    while let Ok(line) = read_line(&mut member.stream) {
        if line.is_empty() {
            break;
        }
        seen.extend_from_slice(&line);
        let verb = line.get(..4).unwrap_or_default().to_ascii_uppercase();
        let reply = match verb.as_slice() {
            b"XCLI" => "220 good again\r\n",
            b"EHLO" if matches!(member.stream, Wire::Tls(_)) => {
                "250-good\r\n250-PIPELINING\r\n250-REQUIRETLS\r\n250-XCLIENT ADDR HELO\r\n250 SIZE\r\n"
            }
            b"EHLO" => {
                "250-good\r\n250-PIPELINING\r\n250-AUTH PLAIN\r\n250-STARTTLS\r\n250 SIZE\r\n"
            }
            b"DATA" => {
                member.say("354 go\r\n");
                match content(&mut member.stream, &mut seen) {
                    Ok(()) => "250 2.0.0 taken\r\n",
                    Err(_) => {
                        end = "LOST";
                        break;
                    }
                }
            }
            b"QUIT" => "221 bye\r\n",
            _ => "250 ok\r\n",
        };
        if !member.say(reply) {
            break;
        }
    }
    seen.extend_from_slice(end.as_bytes());
    let _ = member.log.send(seen);
}

/// A server that has no time.
pub(super) fn busy(member: &mut Member) {
    member.say("421 busy\r\n");
}

/// A server that says nothing and closes.
pub(super) fn dead(member: &mut Member) {
    member.die();
}

/// A server that dies within the first message.
pub(super) fn mortal(member: &mut Member) {
    member.say("220 mortal\r\n");
    while let Some(line) = member.line() {
        if line.starts_with(b"DATA") {
            member.say("354 go\r\n");
            member.line();
            return member.die();
        }
        member.say("250 ok\r\n");
    }
}

/// Reads up to CRLF.CRLF.
fn content(stream: &mut impl Read, seen: &mut Vec<u8>) -> io::Result<()> {
    let start = seen.len();
    let mut buffer = [0; 64 * 1024];
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        seen.extend_from_slice(&buffer[..count]);
        if seen[start..].ends_with(b"\r\n.\r\n") || seen[start..] == *b".\r\n" {
            return Ok(());
        }
    }
}

fn read_line(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") {
        if stream.read(&mut byte)? == 0 {
            break;
        }
        line.push(byte[0]);
    }
    Ok(line)
}

fn serve(script: Script, tls: Arc<ServerConfig>, log: mpsc::Sender<Vec<u8>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (log, tls) = (log.clone(), tls.clone());
            stream.set_nodelay(true).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let stream = Wire::Plain(stream);
            thread::spawn(move || script(&mut Member { stream, tls, log }));
        }
    });
    address
}

pub(super) fn cell() -> &'static TrafficCell {
    Box::leak(Box::default())
}
