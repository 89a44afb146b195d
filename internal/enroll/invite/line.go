package invite

import (
	"crypto/sha256"
	"fmt"
	"strings"
)

// Line is what a person pastes into a root shell of the machine: server is
// isthmusd's address, bundle the mesh's CA certificates (PEM), and args are for
// isthmus-agent join. The certificates are fetched without trust, checked by
// their hash, and from then on the only ones that count; the token goes through
// standard input.
func Line(server string, bundle []byte, token string, args ...string) string {
	extra := ""
	for _, a := range args {
		extra += " " + shellQuote(a)
	}
	return fmt.Sprintf(`(set -e; umask 077; d=$(mktemp -d); trap 'rm -rf "$d"' EXIT; `+
		`curl -fsSk --http1.1 https://%[1]s/join/ca.pem -o "$d/ca.pem"; `+
		`echo "%[2]x  $d/ca.pem" | sha256sum -c --quiet - || { echo "isthmus: %[1]s is not the control plane that invited this machine" >&2; exit 1; }; `+
		`curl -fsS --http1.1 --cacert "$d/ca.pem" https://%[1]s/join/script -o "$d/join.sh"; `+
		`echo %[3]s | sh "$d/join.sh" "$d"%[4]s)`, server, sha256.Sum256(bundle), token, extra)
}

func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
