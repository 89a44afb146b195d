package server

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"sync"
	"text/template"
	"time"

	"golang.org/x/time/rate"
)

//go:embed join.sh
var joinScript string

var joinTemplate = template.Must(template.New("join.sh").Parse(joinScript))

// joinFiles serves what a machine needs to join, on paths under /join/: the CA's
// certificates (fetched without trust, checked by their hash), the script, and
// the two binaries, whose hashes the script carries. Nothing here is secret.
type joinFiles struct {
	bundle   func() []byte // PEM
	agent    string        // path of isthmus-agent
	envoy    string        // path of Envoy
	download *rate.Limiter // of all downloads together, bytes a second
	places   *places       // of downloads
	shed     *shedding
	log      *slog.Logger

	mu     sync.Mutex
	hashes map[string]fileHash
}

type fileHash struct {
	modified time.Time
	size     int64
	sum      string
}

const (
	downloadBurst = 1 << 20
	// slowest is the rate, in bytes a second, below which a download is cut off: it
	// keeps others from theirs.
	slowest = 32 << 10
)

// newJoinFiles limits downloads to a rate in bytes a second, and to so many at once.
func newJoinFiles(bundle func() []byte, agent, envoy string, bytesPerSecond, downloads int, shed *shedding, log *slog.Logger) *joinFiles {
	return &joinFiles{bundle: bundle, agent: agent, envoy: envoy, log: log, hashes: map[string]fileHash{}, shed: shed,
		places: newPlaces(downloads, (downloads+1)/2), download: rate.NewLimiter(rate.Limit(bytesPerSecond), downloadBurst)}
}

func (j *joinFiles) register(mux *http.ServeMux) {
	mux.HandleFunc("GET /join/ca.pem", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/x-pem-file")
		_, _ = w.Write(j.bundle())
	})
	mux.HandleFunc("GET /join/script", j.script)
	mux.HandleFunc("GET /join/isthmus-agent", func(w http.ResponseWriter, r *http.Request) { j.file(w, r, j.agent) })
	mux.HandleFunc("GET /join/envoy", func(w http.ResponseWriter, r *http.Request) { j.file(w, r, j.envoy) })
}

// hostPort is what a client may have called us: it becomes a word of the script.
var hostPort = regexp.MustCompile(`^([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?$`)

func (j *joinFiles) script(w http.ResponseWriter, r *http.Request) {
	if !hostPort.MatchString(r.Host) {
		http.Error(w, "the Host header is not HOST:PORT", http.StatusBadRequest)
		return
	}
	words := map[string]string{"Server": r.Host}
	for name, path := range map[string]string{"Agent": j.agent, "Envoy": j.envoy} {
		sum, err := j.hash(path)
		if err != nil {
			j.log.Warn("a machine can't join: a binary is missing", "path", path, "error", err)
			http.Error(w, "the control plane can't serve isthmus-agent and Envoy: its log says which is missing; put it beside isthmusd, or name it in the configuration (join)",
				http.StatusServiceUnavailable)
			return
		}
		words[name] = sum
	}
	var b bytes.Buffer
	if err := joinTemplate.Execute(&b, words); err != nil {
		http.Error(w, "the control plane can't write the script", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/x-shellscript")
	_, _ = w.Write(b.Bytes())
}

// hash of a file, computed again when the file changed.
func (j *joinFiles) hash(path string) (string, error) {
	st, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if h, ok := j.hashes[path]; ok && h.modified.Equal(st.ModTime()) && h.size == st.Size() {
		return h.sum, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	h := fileHash{modified: st.ModTime(), size: st.Size(), sum: hex.EncodeToString(sum.Sum(nil))}
	j.hashes[path] = h
	return h.sum, nil
}

func (j *joinFiles) file(w http.ResponseWriter, r *http.Request, path string) {
	release, ok := j.places.take(remote(r))
	if !ok {
		j.shed.downloads.Add(1)
		retryAfter(w, downloadRetry, "isthmusd serves as many downloads as it may now: try again in a moment")
		return
	}
	defer release()
	f, err := os.Open(path)
	if err != nil {
		http.Error(w, "the control plane has no such file", http.StatusServiceUnavailable)
		return
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		http.Error(w, "the control plane can't read the file", http.StatusServiceUnavailable)
		return
	}
	end := time.Now().Add(time.Minute + time.Duration(st.Size()/slowest)*time.Second)
	if err := http.NewResponseController(w).SetWriteDeadline(end); err != nil {
		http.Error(w, "the connection has no deadlines", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(limitedWriter{w, r, j.download}, r, "", st.ModTime(), f)
}

// remote is the address that a request came from.
func remote(r *http.Request) net.Addr {
	ap, _ := netip.ParseAddrPort(r.RemoteAddr) // zero: none, all such share a place
	return net.TCPAddrFromAddrPort(ap)
}

// limitedWriter keeps downloads from taking the network of everything else.
type limitedWriter struct {
	http.ResponseWriter
	r     *http.Request
	limit *rate.Limiter
}

func (l limitedWriter) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 {
		n := min(len(p), downloadBurst)
		if err := l.limit.WaitN(l.r.Context(), n); err != nil {
			return written, err
		}
		n, err := l.ResponseWriter.Write(p[:n])
		written += n
		if err != nil {
			return written, err
		}
		p = p[n:]
	}
	return written, nil
}
