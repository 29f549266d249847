//! The way in: what happens between accept and the dialogue.
//!
//! `limits → PROXY protocol header → policies of whom it names → limit of the source → TLS from the first byte, or a look
//! at who talks before being greeted`. Most virtual servers have none of these, and nothing waits for what they lack.

use std::{mem::MaybeUninit, net::SocketAddr, sync::atomic::Ordering::Relaxed};

use socket2::SockRef;
use tokio::{
    io::AsyncReadExt as _,
    net::TcpStream,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    Security, Service, Source,
    client::ClientStream,
    crowd::{Full, Place},
    header::{self, Progress},
    orders::Control,
    session::{Context, Serving},
    source::is_own,
};
use crate::{
    model::{policy::Action, session::PregreetAction},
    smtp::{
        end::End,
        phase::Phase,
        reply::Local,
        session::{ClientSecurity, EARLY, SHUTDOWN},
    },
    tls::ListenerTls,
};

const TOO_MANY: Local = Local::new(421, "4.3.2", "Too many connections");
const TOO_MANY_OF_SOURCE: Local =
    Local::new(421, "4.7.0", "Too many connections from your network");
const DENIED: Local = Local::new(554, "5.7.1", "Access denied");

/// The first octet of a TLS handshake record (RFC 8446 §5.1); no command begins with it.
const HANDSHAKE: u8 = 0x16;

/// A connection that gets no dialogue: why, and what a client in plaintext is told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Refused {
    pub(super) end: End,
    pub(super) reply: Option<Local>,
}

/// A connection's places among all sessions and among those of its virtual server.
#[derive(Debug)]
pub(super) struct Places([Place; 2]);

impl Places {
    pub(super) fn take(context: &Context, service: &Service) -> Result<Self, Refused> {
        let refused = |Full| refuse(End::TooManySessions, TOO_MANY);
        let most = service.terms.max_sessions.unwrap_or(u32::MAX);
        let whole = context.crowd.enter(service.sessions.max).map_err(refused)?;
        let own = service.crowd.enter(most).map_err(refused)?;
        Ok(Self([whole, own]))
    }
}

fn refuse(end: End, reply: Local) -> Refused {
    Refused {
        end,
        reply: Some(reply),
    }
}

impl Refused {
    /// Says it to a client that has just come and in plaintext, as far as that goes without waiting.
    pub(super) fn say(self, client: &ClientStream) {
        let (Some(reply), ClientStream::Plain(tcp)) = (self.reply, client) else {
            return;
        };
        let mut text = Vec::new();
        reply.write(&mut text, true);
        // Nothing was sent before: the kernel has room for a line. Bytes that are left unread would turn the close
        // into a reset, which could overtake it.
        let _ = tcp.try_write(&text);
        let socket = SockRef::from(tcp);
        let _ = socket.shutdown(std::net::Shutdown::Write);
        let _ = socket.recv(&mut [MaybeUninit::uninit(); 4096]);
    }
}

impl Serving {
    /// Brings the client to where the dialogue can begin.
    ///
    /// # Errors
    /// It gets none.
    pub(super) async fn enter(
        &mut self,
        client: &mut ClientStream,
        places: &mut Places,
    ) -> Result<ClientSecurity, Refused> {
        let service = self.service.clone();
        if service.terms.trusts(self.peer.ip()) {
            self.take_header(client).await?;
        }
        let most = service.terms.max_sessions_per_source.unwrap_or(u32::MAX);
        places.0[1]
            .belong(self.peer.ip(), most)
            .map_err(|Full| refuse(End::TooManyOfSource, TOO_MANY_OF_SOURCE))?;
        match &service.client_tls {
            Security::Implicit(tls) => {
                self.secure(client, tls).await?;
                return Ok(ClientSecurity::Implicit);
            }
            Security::StartTls { tls, .. } if self.awaits_hello(client).await? => {
                self.secure(client, tls).await?;
                return Ok(ClientSecurity::Implicit);
            }
            Security::StartTls { .. } => {}
            Security::None => _ = self.awaits_hello(client).await?,
        }
        Ok(service.client_tls.for_dialogue())
    }

    /// Learns from the header of a balancer in front of us who the client is.
    async fn take_header(&mut self, client: &mut ClientStream) -> Result<(), Refused> {
        self.present.entry.set_phase(Phase::ProxyHeader);
        let bad = Refused {
            end: End::BadProxyHeader,
            reply: None,
        };
        let ClientStream::Plain(tcp) = client else {
            return Err(bad);
        };
        let limit = self.service.sessions.timeouts.proxy_header;
        let told = match self.patiently(timeout(limit, read_header(tcp))).await? {
            Ok(Some(told)) => told,
            Ok(None) | Err(_) => return Err(bad),
        };
        let Some((source, destination)) = told else {
            return Ok(());
        };
        if !header::is_client(source.ip()) {
            return Err(bad);
        }
        if let Source::Client(_) = self.service.source
            && (is_own(source.ip()) || self.context.services.have(source.ip()))
        {
            // Members would take the client for one of those that they trust.
            return Err(bad);
        }
        (self.peer, self.local) = (source, destination);
        self.present.entry.set_client(source);
        let now = jiff::Timestamp::now();
        for policy in &self.service.policies {
            match policy.judge(source.ip(), now) {
                Action::Accept => {}
                Action::Drop => {
                    return Err(Refused {
                        end: End::Denied,
                        reply: None,
                    });
                }
                _ => return Err(refuse(End::Denied, DENIED)),
            }
        }
        Ok(())
    }

    async fn secure(
        &mut self,
        client: &mut ClientStream,
        tls: &ListenerTls,
    ) -> Result<(), Refused> {
        self.present.entry.set_phase(Phase::Handshake);
        let limit = self.service.sessions.timeouts.handshake;
        let secured = self.patiently(Box::pin(client.secure(tls, limit))).await;
        // Words in clear would be no TLS.
        let secured = secured.map_err(|stopped| Refused {
            reply: None,
            ..stopped
        })?;
        if let Err(end) = secured {
            // Not TLS from the first byte on: nobody injected anything.
            let end = if end == End::StartTlsInjection {
                End::TlsFailed
            } else {
                end
            };
            return Err(Refused { end, reply: None });
        }
        self.tls = client.tls();
        Ok(())
    }

    /// Keeps the greeting back as long as the virtual server wants it, and judges who talks meanwhile. True for a
    /// ClientHello, where one is looked for.
    async fn awaits_hello(&mut self, client: &ClientStream) -> Result<bool, Refused> {
        let terms = &self.service.terms;
        let pregreet = terms.pregreet.map(|pregreet| pregreet.wait);
        let detect = terms.detect_implicit_tls;
        let (Some(wait), ClientStream::Plain(tcp)) = (pregreet.max(detect), client) else {
            return Ok(false);
        };
        self.present.entry.set_phase(Phase::Pregreet);
        let until = Instant::now() + wait;
        let first = self.patiently(timeout_at(until, first_byte(tcp))).await?;
        match first {
            Ok(None) => Err(Refused {
                end: End::ClientClosed,
                reply: None,
            }),
            Ok(Some(HANDSHAKE)) if detect.is_some() => Ok(true),
            Ok(Some(_)) if pregreet.is_some() => {
                self.early_talker().await?;
                Ok(false)
            }
            // A client in a hurry, and a patient one.
            Ok(Some(_)) | Err(_) => Ok(false),
        }
    }

    /// The client talks before it is greeted.
    pub(super) async fn early_talker(&mut self) -> Result<(), Refused> {
        self.early = true;
        self.context.events.early_talker.fetch_add(1, Relaxed);
        match self.service.terms.pregreet.map(|pregreet| pregreet.action) {
            Some(PregreetAction::Reject) => Err(refuse(End::Pregreet, EARLY)),
            Some(PregreetAction::Delay(penalty)) => self.patiently(sleep(penalty)).await,
            Some(PregreetAction::Log) | None => Ok(()),
        }
    }

    /// Waits for something, but not when the daemon stops.
    async fn patiently<T>(&self, wait: impl Future<Output = T>) -> Result<T, Refused> {
        let mut control = self.context.control.clone();
        tokio::select! {
            biased;
            done = wait => Ok(done),
            _ = control.wait_for(|orders| orders.all >= Control::Drain) => {
                Err(refuse(End::Drained, SHUTDOWN))
            }
        }
    }
}

/// The first byte, left where it is; nothing where the client is gone.
async fn first_byte(tcp: &TcpStream) -> Option<u8> {
    let mut byte = [0];
    match tcp.peek(&mut byte).await {
        Ok(1..) => Some(byte[0]),
        _ => None,
    }
}

/// What a header tells, read without a byte of what is behind it; nothing where it is none.
async fn read_header(tcp: &mut TcpStream) -> Option<Option<(SocketAddr, SocketAddr)>> {
    let mut bytes = [0; header::LONGEST];
    let mut have = 0;
    loop {
        let seen = tcp
            .peek(&mut bytes[have..])
            .await
            .ok()
            .filter(|seen| *seen > 0)?;
        let (take, told) = match header::parse(&bytes[..have + seen]).ok()? {
            Progress::Done { length, told } => (length - have, Some(told)),
            Progress::More => (seen, None),
        };
        // They are there.
        tcp.read_exact(&mut bytes[have..have + take]).await.ok()?;
        have += take;
        if told.is_some() {
            return told;
        }
    }
}
