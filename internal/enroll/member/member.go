// Package member is what a WorkloadEntry says of the machine that it stands for,
// beyond what is a row: who admitted it, and which replica of isthmusd has contact.
//
// internal/source/kube makes one of each entry of a machine that joined, for the
// leases of internal/enroll, which looks at all of them time and again.
package member

import (
	"time"

	"istio.io/api/annotation"

	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/model"
)

// Member is a machine that joined. It is not changed once made.
type Member struct {
	Key            model.Key
	ServiceAccount string
	UID            string // of the JoinToken that admitted it
	Controller     string // replica that had contact last
	Healthy        string // reason of the condition Healthy; "" without one
	Created        time.Time
	Connected      time.Time // last; zero: never
	Disconnected   time.Time // when contact was lost; zero: it was not
}

// Token is what is known from memory of a JoinToken.
type Token struct {
	Namespace, Name, UID string
	Used                 bool
	Expires              time.Time
}

// TimeFormat of Istio's annotations.
const TimeFormat = time.RFC3339Nano

// Of reads the annotations of an entry; nil if no machine that joined made it.
func Of(key model.Key, account string, annotations map[string]string, healthy string, created time.Time) *Member {
	uid := annotations[v1alpha1.AnnotationMembership]
	if uid == "" {
		return nil
	}
	at := func(name string) time.Time {
		t, err := time.Parse(TimeFormat, annotations[name])
		if err != nil {
			return time.Time{} // as if it were missing
		}
		return t
	}
	return &Member{
		Key: key, ServiceAccount: account, UID: uid, Controller: annotations[annotation.IoIstioWorkloadController.Name],
		Healthy: healthy, Created: created,
		Connected: at(annotation.IoIstioConnectedAt.Name), Disconnected: at(annotation.IoIstioDisconnectedAt.Name),
	}
}

// InContact tells whether some replica had contact when it wrote last.
func (m *Member) InContact() bool { return !m.Connected.IsZero() && m.Disconnected.IsZero() }
