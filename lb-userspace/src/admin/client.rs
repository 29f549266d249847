//! Asks the daemon; blocking, one short-lived connection per question.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Method, Request, StatusCode, body::Bytes, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use super::{
    FlowPage, Refusal, RefusalKind,
    query::{self, FlowQuery},
    route::{Action, NEXT, Route},
    view::{
        CertificateView, CountView, ExplanationView, MemberView, PolicyView, Question, ReloadView,
        SessionView, Stats, Status,
    },
};
use crate::pool::Admin;

/// How long a question may take, flow tables of a million entries included.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// More than any answer: flows come in portions.
const ANSWER_BYTES: usize = 1 << 28;

/// A client of one daemon.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    deadline: Duration,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "no daemon answers on {}: {source}\n  \
         Start it with `smtplb run` or `systemctl start smtplb`, or name the socket of a running one with `--admin`.",
        .socket.display()
    )]
    Unreachable {
        /// Where it was looked for.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The socket belongs to somebody else.
    #[error(
        "may not connect to {}: {source}\n  \
         The admin socket is open to the user the daemon runs as: use that user, or root.",
        .socket.display()
    )]
    Denied {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It listens, but does not answer.
    #[error(
        "the daemon on {} gave no answer within {} s\n  Try again; if it stays so, look at its log.",
        .socket.display(), .deadline.as_secs_f32()
    )]
    Late {
        /// The socket.
        socket: PathBuf,
        /// How long it was waited for.
        deadline: Duration,
    },
    /// It answers that it does not do it, and why.
    #[error("{0}")]
    Refused(Refusal),
    /// What came back is no answer.
    #[error(
        "the answer of {} is not understood: {why}\n  \
         Is the daemon of another version than this command? Restart it after an upgrade.",
        .socket.display()
    )]
    Answer {
        /// The socket.
        socket: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// What came back.
struct Answer {
    body: Bytes,
    next: Option<u32>,
}

/// The body of an answer that is not 200.
#[derive(Deserialize)]
struct Fault {
    error: String,
}

impl Client {
    /// A client of the daemon that listens on `socket`; nothing is opened yet.
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            deadline: DEADLINE,
        }
    }

    /// The same, waiting no longer than `deadline` for an answer.
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// `GET /v1/status`
    ///
    /// # Errors
    /// When the daemon gives no answer, or one that is not understood.
    pub fn status(&self) -> Result<Status, ClientError> {
        self.get(Route::Status)
    }

    /// `GET /v1/flows`: one portion, and where the next begins.
    ///
    /// # Errors
    /// As [`Self::status`], and when the query names what is not there.
    pub fn flows(&self, query: &FlowQuery) -> Result<FlowPage, ClientError> {
        let path = Route::Flows.path();
        let answer = self.ask(&Method::GET, path, &query.to_query())?;
        let flows = serde_json::from_slice(&answer.body).map_err(|error| self.answer(error))?;
        Ok(FlowPage {
            flows,
            next: answer.next,
        })
    }

    /// `GET /v1/flows/count`
    ///
    /// # Errors
    /// As [`Self::flows`].
    pub fn count_flows(&self, query: &FlowQuery) -> Result<CountView, ClientError> {
        self.read(&Method::GET, Route::FlowCount.path(), &query.to_query())
    }

    /// `POST /v1/reload`
    ///
    /// # Errors
    /// As [`Self::status`], and when the file has faults.
    pub fn reload(&self, dry_run: bool) -> Result<ReloadView, ClientError> {
        let query = if dry_run { "dry_run=1" } else { "" };
        self.read(&Method::POST, Action::Reload.path(), query)
    }

    /// `POST /v1/members`; `member` is `POOL/MEMBER`.
    ///
    /// # Errors
    /// As [`Self::status`], and when there is no such member.
    pub fn set_member(
        &self,
        member: &str,
        admin: Admin,
        deadline: Option<Duration>,
    ) -> Result<MemberView, ClientError> {
        let mut pairs = vec![
            ("member", member.to_owned()),
            ("state", admin.word().to_owned()),
        ];
        if let Some(deadline) = deadline {
            pairs.push(("deadline_ms", deadline.as_millis().to_string()));
        }
        self.read(&Method::POST, Action::Member.path(), &query::query(&pairs))
    }

    /// `GET /v1/sessions`
    ///
    /// # Errors
    /// As [`Self::status`].
    pub fn sessions(&self) -> Result<Vec<SessionView>, ClientError> {
        self.get(Route::Sessions)
    }

    /// `GET /v1/policies`
    ///
    /// # Errors
    /// As [`Self::status`].
    pub fn policies(&self) -> Result<Vec<PolicyView>, ClientError> {
        self.get(Route::Policies)
    }

    /// `GET /v1/certificates`
    ///
    /// # Errors
    /// As [`Self::status`].
    pub fn certificates(&self) -> Result<Vec<CertificateView>, ClientError> {
        self.get(Route::Certificates)
    }

    /// `GET /v1/explain`
    ///
    /// # Errors
    /// As [`Self::status`], and when it names what is not there.
    pub fn explain(&self, question: &Question) -> Result<ExplanationView, ClientError> {
        self.read(&Method::GET, Route::Explain.path(), &question.to_query())
    }

    /// `GET /v1/stats`
    ///
    /// # Errors
    /// As [`Self::status`].
    pub fn stats(&self) -> Result<Stats, ClientError> {
        self.get(Route::Stats)
    }

    /// The answer to any route, as `T`.
    ///
    /// # Errors
    /// As [`Self::status`].
    ///
    /// # Panics
    /// When called from within an async runtime: it blocks.
    pub fn get<T: DeserializeOwned>(&self, route: Route) -> Result<T, ClientError> {
        self.read(&Method::GET, route.path(), "")
    }

    fn read<T: DeserializeOwned>(
        &self,
        method: &Method,
        path: &str,
        query: &str,
    ) -> Result<T, ClientError> {
        let answer = self.ask(method, path, query)?;
        serde_json::from_slice(&answer.body).map_err(|error| self.answer(error))
    }

    fn ask(&self, method: &Method, path: &str, query: &str) -> Result<Answer, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| self.answer(error))?;
        let uri = match query {
            "" => path.to_owned(),
            query => format!("{path}?{query}"),
        };
        runtime
            .block_on(async { tokio::time::timeout(self.deadline, self.fetch(method, &uri)).await })
            .unwrap_or_else(|_| Err(self.late()))
    }

    async fn fetch(&self, method: &Method, uri: &str) -> Result<Answer, ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| self.no_connection(error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.answer(error))?;
        // It ends with the runtime, or with the connection.
        tokio::spawn(connection);

        let request = Request::builder()
            .method(method)
            .uri(uri)
            .header(HOST, "smtplb")
            .body(Empty::<Bytes>::new())
            .map_err(|error| self.answer(error))?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| self.answer(error))?;
        let status = response.status();
        let next = response.headers().get(NEXT);
        let next = next.and_then(|value| value.to_str().ok()?.parse().ok());
        let body = Limited::new(response.into_body(), ANSWER_BYTES)
            .collect()
            .await
            .map_err(|error| self.answer(error))?
            .to_bytes();
        if status != StatusCode::OK {
            if let Ok(Fault { error }) = serde_json::from_slice(&body) {
                return Err(ClientError::Refused(Refusal::new(
                    RefusalKind::from_status(status.as_u16()),
                    error,
                )));
            }
            let said = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
            return Err(self.answer(format!("{status} {said}")));
        }
        Ok(Answer { body, next })
    }

    fn no_connection(&self, source: io::Error) -> ClientError {
        let socket = self.socket.clone();
        match source.kind() {
            io::ErrorKind::PermissionDenied => ClientError::Denied { socket, source },
            // A full backlog: somebody is there.
            io::ErrorKind::WouldBlock => self.late(),
            _ => ClientError::Unreachable { socket, source },
        }
    }

    fn late(&self) -> ClientError {
        ClientError::Late {
            socket: self.socket.clone(),
            deadline: self.deadline,
        }
    }

    fn answer(&self, why: impl ToString) -> ClientError {
        ClientError::Answer {
            socket: self.socket.clone(),
            why: why.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::UnixListener,
        thread,
    };

    use super::*;
    use crate::admin::{
        Source,
        sample::{FakeSource, with_server},
        view::{PoolView, VirtualServerView},
    };

    #[test]
    fn gets_what_the_source_says() {
        with_server(|socket| {
            let client = Client::new(socket);
            let status = FakeSource.status();
            assert_eq!(client.status().unwrap(), status);
            let all = FlowQuery::default();
            let page = client.flows(&all).unwrap();
            assert_eq!(page.flows, FakeSource.flows(&all).unwrap().flows);
            assert_eq!(page.next, Some(7));
            assert_eq!(client.count_flows(&all).unwrap().count, 1);
            assert!(client.reload(true).unwrap().changes.len() == 1);
            let minute = Some(Duration::from_secs(60));
            let member = client.set_member("msa/msa1", Admin::Drain, minute).unwrap();
            assert_eq!(
                (member.admin.as_str(), member.deadline_s),
                ("drain", Some(60))
            );
            let unknown = client
                .set_member("msa/msa9", Admin::Ready, None)
                .unwrap_err();
            assert!(matches!(unknown, ClientError::Refused(_)), "{unknown}");
            assert_eq!(client.sessions().unwrap(), FakeSource.sessions());
            assert_eq!(client.stats().unwrap(), FakeSource.stats());
            let servers: Vec<VirtualServerView> = client.get(Route::VirtualServers).unwrap();
            assert_eq!(servers, status.virtual_servers);
            let pools: Vec<PoolView> = client.get(Route::Pools).unwrap();
            assert_eq!(pools, status.pools);
            let members: Vec<MemberView> = client.get(Route::Members).unwrap();
            assert_eq!(members, status.into_members());
        });
    }

    #[test]
    fn nobody_there() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("admin.sock");
        let missing = Client::new(&socket).status().unwrap_err();
        assert!(
            matches!(missing, ClientError::Unreachable { .. }),
            "{missing}"
        );
        assert!(missing.to_string().contains("smtplb run"), "{missing}");
        drop(UnixListener::bind(&socket).unwrap());
        let stale = Client::new(&socket).status().unwrap_err();
        assert!(matches!(stale, ClientError::Unreachable { .. }), "{stale}");
    }

    #[test]
    fn a_daemon_that_hangs_is_late() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("admin.sock");
        let _listener = UnixListener::bind(&socket).unwrap();
        let client = Client::new(&socket).with_deadline(Duration::from_millis(50));
        let late = client.status().unwrap_err();
        assert!(matches!(late, ClientError::Late { .. }), "{late}");
    }

    #[test]
    fn other_answers_are_not_understood() {
        let answers = [
            "",
            "220 mail.example.org ESMTP\r\n",
            "HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}",
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
            "HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n{}",
        ];
        for answer in answers {
            let dir = tempfile::tempdir().unwrap();
            let socket = dir.path().join("admin.sock");
            let listener = UnixListener::bind(&socket).unwrap();
            let peer = thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.read(&mut [0; 1024]).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            });
            let error = Client::new(&socket).status().unwrap_err();
            assert!(
                matches!(error, ClientError::Answer { .. }),
                "{answer:?}: {error}"
            );
            peer.join().unwrap();
        }
    }
}
