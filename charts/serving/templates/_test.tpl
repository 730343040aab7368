{{/* A pod of `helm test`; the context is a list: the chart's context, the pod's name and its program. */}}
{{- define "serving.testPod" -}}
{{- $name := index . 1 }}
{{- $program := index . 2 }}
{{- with first . }}
apiVersion: v1
kind: Pod
metadata:
  name: {{ include "serving.fullname" . }}-{{ $name }}
  labels:
    {{- include "serving.commonLabels" . | nindent 4 }}
    {{- include "serving.testLabels" . | nindent 4 }}
  annotations:
    helm.sh/hook: test
    # Keep a failed pod until the next test, for its log.
    helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
spec:
  restartPolicy: Never
  serviceAccountName: {{ include "serving.serviceAccountName" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- include "serving.podSecurityContext" . | nindent 4 }}
  containers:
    - name: {{ $name }}
      image: {{ include "serving.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command:
        - python
        - -c
        - |
          {{- .Files.Get $program | trim | nindent 10 }}
      env:
        {{- include "serving.baseEnv" . | nindent 8 }}
        - name: URL
          value: {{ include "serving.scheme" . }}://{{ include "serving.fullname" . }}:{{ .Values.service.port | int }}
        - name: MODEL
          value: {{ include "serving.servedName" . | quote }}
        - name: TIMEOUT
          value: {{ .Values.test.timeoutSeconds | int | quote }}
        {{- if .Values.tls.enabled }}
        - name: CA
          value: /etc/ictx/tls/ca.crt
        {{- end }}
        - name: KEY
          valueFrom:
            secretKeyRef:
              name: {{ include "serving.apiKeySecret" . }}
              key: {{ .Values.apiKey.key }}
      securityContext:
        {{- include "serving.containerSecurityContext" . | nindent 8 }}
      resources:
        {{- toYaml .Values.test.resources | nindent 8 }}
      terminationMessagePolicy: FallbackToLogsOnError
      volumeMounts:
        - name: tmp
          mountPath: /tmp
        {{- if .Values.tls.enabled }}
        - name: ca
          mountPath: /etc/ictx/tls
          readOnly: true
        {{- end }}
  volumes:
    {{- if .Values.tls.enabled }}
    # Without ca.crt, the certificate must be signed by an authority that the image trusts.
    - name: ca
      secret:
        secretName: {{ include "serving.tlsSecret" . }}
        items: [{key: ca.crt, path: ca.crt}]
        optional: true
    {{- end }}
    - name: tmp
      emptyDir:
        sizeLimit: 64Mi
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}
